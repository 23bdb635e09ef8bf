"""Commands that refuse an option that is given twice, of which click would heed only the last one.

Must not know any option.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import click


class GivenOnce(click.Command):
    """A command whose options with a value may be given once, unless they are made to be repeated."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Check that nothing is repeated, then parse."""
        if not ctx.resilient_parsing:  # otherwise a shell completes words
            self._check(ctx, args)
        return super().parse_args(ctx, args)

    def _check(self, ctx: click.Context, args: Sequence[str]) -> None:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        for param, times in collections.Counter(order).items():
            if times > 1 and isinstance(param, click.Option) and not _may_repeat(param):
                names = " or ".join([param.opts[0], *param.secondary_opts[:1]])
                raise click.UsageError(f"{names} is given {times} times; give it once", ctx)


def _may_repeat(option: click.Option) -> bool:
    """Whether a repetition changes nothing, or adds a value."""
    return option.multiple or option.count or (option.is_flag and not option.secondary_opts)
