"""The checker that the jaxtyping import hook puts on every function of `mor`."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
