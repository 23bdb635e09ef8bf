"""The version of a file that an HTTP source serves, and in which other ways it has been proved to be told of.

Owns the judgement of an answer in the light of what is known, and the proof where that leaves a doubt. Must not know
connections or places: it is handed a way to read.

No task changes it while another one proves something (`_resolving` of the client), but for what a judge joins to it.
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

MOST_ALSO = 8  # ways in which servers may show one version


class Version:
    """What is served. `samples`: of what was read of it, in this session or an earlier one."""

    def __init__(self, identity: Identity, pinning: Pinning, samples: Samples) -> None:
        self.identity = identity
        self.pinning = pinning
        self.samples = samples
        self._also: tuple[Identity, ...] = ()  # what else is shown with this version
        self._used = False  # an answer of this version was taken

    def judge(self, answer: Answer, request: RangeRequest) -> Part:
        """Which part of the answer's body is what was asked for. Errors as `judge_range`."""
        # By what is known now: two answers that both tell what the first one did not must agree as well.
        request = dataclasses.replace(request, identity=self.identity, also=self._also, pinning=self.pinning)
        self.identity, part = judge_range(answer, request)
        self._used = True
        return part

    def judge_shown(self, answer: Answer, request: RangeRequest, shown: Identity) -> Part:
        """The same for bytes that are to prove that `shown` is this version."""
        also = (*self._also, shown)
        request = dataclasses.replace(request, identity=self.identity, also=also, pinning=self.pinning)
        return judge_range(answer, request)[1]

    def knows(self, shown: Identity) -> bool:
        """Whether this version is known to be told of like that."""
        return any(known.tells_as(shown) for known in (self.identity, *self._also))

    async def accept(self, shown: Identity, where: str, read: Read) -> None:
        """A server, asked anew, shows this. Raises SourceChanged if it is another version; errors of `read`."""
        verdict = self.identity.compare(shown)
        if verdict.sameness is Sameness.CHANGED:
            raise SourceChanged(f"{where}: {verdict.why}")
        if verdict.sameness is Sameness.SAME or self.knows(shown):
            self.identity = self.identity.joined(shown)
        else:
            await self.admit(Doubted(shown, verdict.why), where, read)

    async def admit(self, doubt: Doubted, where: str, read: Read) -> None:
        """Accept what was shown from now on, if the bytes are the same. `read` reads what is shown, whatever it is.

        Raises:
            SourceChanged: they are not, or there are none to compare.
            QedfsError: they could not be had.
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
            self.identity = doubt.shown  # nothing was taken of another one; an overlay may have a pin that knows better
        elif not doubt.why:
            self.identity = self.identity.joined(doubt.shown)
        elif doubt.shown.place != self.identity.place:
            # A new server; whoever has pinned the old one's tags is told by the new identity.
            self._also = (*self._also, self.identity)[-MOST_ALSO:]
            self.identity = doubt.shown
        else:
            self._also = (*self._also, doubt.shown)[-MOST_ALSO:]
