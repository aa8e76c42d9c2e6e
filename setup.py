"""Maps the four top-level folders into one installable package, `moe_engine`.

The folders `kernels`, `train` and `bench` have names too generic to install as they are.
"""

from setuptools import setup

setup(
    packages=[
        "moe_engine",
        "moe_engine.kernels",
        "moe_engine.train",
        "moe_engine.train.prepare",
        "moe_engine.train.doctor",
        "moe_engine.bench",
    ],
    package_dir={
        "moe_engine": "moe_engine",
        "moe_engine.kernels": "kernels",
        "moe_engine.train": "train",
        "moe_engine.bench": "bench",
    },
)
