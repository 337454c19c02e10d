"""The checker that the jaxtyping import hook puts on every function of `mor`."""

import inspect

import beartype
import jaxtyping

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def skip_unannotated() -> None:
  """Leaves functions without annotations as they are.

  The hook decorates a nested function each time that it is made, which took a third
  of the suite, and there is nothing to check in one without types.
  """
  jaxtyped = jaxtyping.jaxtyped

  def decorate(*args, **options):
    if args:
      return jaxtyped(*args, **options)
    checked = jaxtyped(**options)

    def mark(function):
      return function if inspect.isfunction(function) and not function.__annotations__ else checked(function)
    return mark

  jaxtyping.jaxtyped = decorate
