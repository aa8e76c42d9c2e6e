"""`moe-doctor`: is everything in place to train? Runs every check and says what was found, with a remedy.

    moe-doctor --data_dir data/mine --preset tiny

machine (`machine.py`), data (`data.py`), a small model (`model.py`). Exit status: 0, 1 if a check
is a FAIL, 2 for a mistyped flag.
`command.py` holds the options and joins these up.
"""

from moe_engine.train.doctor.command import DoctorConfig, doctor

__all__ = ["DoctorConfig", "doctor"]
