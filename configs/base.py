"""The defaults as they are: `--config=configs/base.py`; `mor/config.py` lists every field."""

from mor import config

get_config = config.default
