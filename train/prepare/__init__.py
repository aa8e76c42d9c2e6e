"""`moe-prepare`: text in, token shards and `meta.json` out.

    moe-prepare --input book.txt notes/ web.jsonl.zst --out_dir data/mine
    moe-prepare --source stdlib --out_dir data/stdlib --tokenizer o200k_base:4096

sources (`sources.py`) → batches of text (`inputs.py`) → batches of tokens, over processes (`encode.py`) → training or
validation (`split.py`) → shards (`output.py`). `command.py` holds the options and joins these up.
"""

from moe_engine.train.prepare.command import PrepareConfig, Prepared, prepare

__all__ = ["PrepareConfig", "Prepared", "prepare"]
