"""The version of the file that an HTTP source serves, and the other identities that were proved to stand for it.

Owns the comparison of an answer with the known identities, and the proof by samples if that leaves a doubt. Must not
know connections or targets: the caller passes a function to read with.

Concurrency. The client's `_resolving` lock ensures that no task changes the version while another one runs a proof. The
exception: `judge` may add validators to the identity at any time.
"""

from __future__ import annotations

import dataclasses
import logging

from qedfs.errors import SourceChanged
from qedfs.source.base import Identity, Sameness
from qedfs.source.http.answer import Answer
from qedfs.source.http.judge import Doubted, Part, RangeRequest, judge_range
from qedfs.source.pinning import Pinning
from qedfs.source.samples import Read, Samples

log = logging.getLogger(__name__)

MOST_ALSO = 8  # further identities that are remembered for one version


class Version:
    """The version that is served. `samples`: taken from reads of it, in this session or an earlier one."""

    def __init__(self, identity: Identity, pinning: Pinning, samples: Samples) -> None:
        self.identity = identity
        self.pinning = pinning
        self.samples = samples
        self._also: tuple[Identity, ...] = ()  # other identities that servers report for this version
        self._used = False  # an answer of this version has been used

    def judge(self, answer: Answer, request: RangeRequest) -> Part:
        """Which part of the answer's body holds the requested range. Raises what `judge_range` raises."""
        # Compare with all that is known now. If the first answer lacked a validator that two later ones have, these two
        # must agree, too.
        request = dataclasses.replace(request, identity=self.identity, also=self._also, pinning=self.pinning)
        self.identity, part = judge_range(answer, request)
        self._used = True
        return part

    def judge_shown(self, answer: Answer, request: RangeRequest, shown: Identity) -> Part:
        """Like `judge`, for the reads of a proof that `shown` is this version."""
        also = (*self._also, shown)
        request = dataclasses.replace(request, identity=self.identity, also=also, pinning=self.pinning)
        return judge_range(answer, request)[1]

    def knows(self, shown: Identity) -> bool:
        """Whether `shown` is known to stand for this version."""
        return any(known.tells_as(shown) for known in (self.identity, *self._also))

    async def accept(self, shown: Identity, where: str, read: Read) -> None:
        """Accept the identity that a server reported when asked again, after a proof if need be.

        Raises SourceChanged if it is another version, and what `read` raises.
        """
        verdict = self.identity.compare(shown)
        if verdict.sameness is Sameness.CHANGED:
            raise SourceChanged(f"{where}: {verdict.why}")
        if verdict.sameness is Sameness.SAME or self.knows(shown):
            self.identity = self.identity.joined(shown)
        else:
            await self.admit(Doubted(shown, verdict.why), where, read)

    async def admit(self, doubt: Doubted, where: str, read: Read) -> None:
        """Accept the reported identity from now on if the sampled bytes are the same.

        `read` reads the file that has the reported identity, whichever version that is.

        Raises:
            SourceChanged: the bytes differ, or there are no samples to compare.
            QedfsError: the bytes could not be read.
        """
        if self.samples:
            different = await self.samples.difference(read, doubt.shown.size)
            if different is not None:
                raise SourceChanged(f"{where}: {', and '.join(filter(None, (doubt.why, different)))}")
            if doubt.why:
                log.info("%s: %s; the bytes are the same", where, doubt.why)
        elif doubt.why and self._used:
            raise SourceChanged(f"{where}: {doubt.why}")
        if not self._used:
            self.identity = doubt.shown  # no other version has been used; an overlay's pin may still refuse it
        elif not doubt.why:
            self.identity = self.identity.joined(doubt.shown)
        elif doubt.shown.place != self.identity.place:
            # A new server. From now on report its identity, so that overlays with the old tags in their pins learn it.
            self._also = (*self._also, self.identity)[-MOST_ALSO:]
            self.identity = doubt.shown
        else:
            self._also = (*self._also, doubt.shown)[-MOST_ALSO:]
