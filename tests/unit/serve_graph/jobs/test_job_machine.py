"""Several owners race for the same jobs, freeze, thaw and are killed at any point: a state machine over real records.

Recorder, Sweeper, JobRecords and LocalStore are the real ones; the clock, the order and the faults are Hypothesis's.
What the store is told is checked at every write, whoever writes it.
"""

import asyncio
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from random_wan import RANDOM_WAN

from schemas.clips import Timings
from schemas.errors import JobCancelled, JobNotFound, StoreUnavailable
from schemas.jobs import TRANSITIONS, JobRecord, JobState, RenderedClip, Tombstone, job_id_from
from schemas.requests import GenerateRequest
from serve_graph.jobs.limits import MIN_ORPHAN_S, Patiences
from serve_graph.jobs.live import LiveJob
from serve_graph.jobs.recording import Lost, Recorder
from serve_graph.jobs.takeover import Sweeper
from storage.batch_records import BatchRecords
from storage.job_records import ENDS, ActiveEntry, Deleted, JobRecords, entry_of
from storage.keys import active_key, clip_key, done_key
from storage.local import LocalStore
from storage.store import ObjectStat, PreconditionFailed
from storage.upkeep import Upkeep

OWNERS = ("ada", "bob", "cyd")
KEYS = ("one", "two", "three")
LEASE_S = 20.0
REQUEST = GenerateRequest(prompt="an otter", seed=7)

UNENDED = (JobState.QUEUED, JobState.PREPARING, JobState.RUNNING)

owners, idempotency_keys, choices = st.sampled_from(OWNERS), st.sampled_from(KEYS), st.integers(0, 8)
faults = st.sampled_from([None] * 6 + ["not applied", "answer lost"])


class AtOnce(Executor):
    """Runs what it is given on the spot, so that every interleaving is one that Hypothesis chose."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # as an executor does it
            future.set_exception(error)
        return future


class JudgingStore(LocalStore):
    """Judges each version of each record by the one before, and knows when it was written, by the common clock."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seconds = 0.0
        self.fault: str | None = None
        self.meanwhile: Callable[[], None] | None = None
        self.written_at: dict[str, float] = {}
        self.commits: dict[str, int] = {}
        self.sweeping = False
        self.writer: str | None = None

    def put(
        self, key: str, body: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat:
        fault, self.fault = self.fault, None
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None and if_match is not None:
            writer, self.writer = self.writer, None
            meanwhile()  # somebody else is faster
            self.writer = writer
        if fault == "not applied":
            raise StoreUnavailable("it can't be reached")
        job_id = key.removeprefix("jobs/").removesuffix(".json") if key.startswith("jobs/") else None
        before = self._record(job_id) if job_id is not None else None
        stat = super().put(key, body, if_none_match=if_none_match, if_match=if_match)
        if job_id is not None:
            self._judge(job_id, before, self._record(job_id))
            self.written_at[job_id] = self.seconds
        if fault == "answer lost":
            raise StoreUnavailable("the answer was lost")
        return stat

    def _record(self, job_id: str) -> JobRecord | Tombstone | None:
        try:
            return JobRecords(self).get(job_id)[0]
        except JobNotFound:
            return None
        except Deleted as deleted:
            return deleted.tombstone

    def _judge(self, job_id: str, before: JobRecord | Tombstone | None, after: JobRecord | Tombstone | None) -> None:
        assert after is not None
        if before is None:
            assert after.state is JobState.QUEUED, "a job begins in line"
            return
        if after.state is not before.state or JobState.PREPARING is after.state is before.state:
            renewed = isinstance(before, JobRecord) and isinstance(after, JobRecord) and before.at == after.at
            assert renewed or after.state in TRANSITIONS[before.state], (before.state, after.state)
        if before.state.is_terminal:
            assert after.state is JobState.DELETED, "an ended job changes no more"
        if after.state is JobState.SUCCEEDED:
            self.commits[job_id] = self.commits.get(job_id, 0) + 1
            assert self.commits[job_id] == 1, "one commit per job"
        if isinstance(before, JobRecord) and before.lease is not None and not self.sweeping:
            told = before.model_copy(update={"cancel_requested": True})
            assert before.lease.owner == self.writer or after == told, "only its owner changes a job, but for a cancel"
        if self.sweeping and before.state.is_owned:
            unchanged_s = self.seconds - self.written_at[job_id]
            assert unchanged_s >= LEASE_S, "an owner that renews keeps its job"


@dataclass
class NoBatches:
    """There are none here."""

    async def see(self, entry: ActiveEntry) -> None:
        raise AssertionError

    async def see_absent(self, active: Collection[str]) -> None:
        assert not active

    def foreign(self) -> list[str]:
        return []

    def not_begun(self, job_id: str) -> None:
        raise AssertionError

    async def file(self, record: JobRecord) -> None:
        raise AssertionError

    async def bury(self, tombstone: Tombstone) -> None:
        pass


@dataclass
class Owner:
    """A process: its jobs, as it last saw them, and the real parts that change their records."""

    name: str
    store: JudgingStore
    recorder: Recorder
    live: dict[str, LiveJob] = field(default_factory=dict)

    def __post_init__(self) -> None:
        patiences = Patiences(worker_s=0, store_s=0, lease_s=LEASE_S)
        self.sweeper = Sweeper(
            self.recorder,
            patiences,
            model=RANDOM_WAN.name,
            jobs=self,
            batches=NoBatches(),
            monotonic=lambda: self.store.seconds,
        )

    # ---- what the sweeper asks of the job service

    def is_live(self, job_id: str) -> bool:
        return job_id in self.live

    def room(self) -> int:
        return 8

    def adopt(self, record: JobRecord, etag: str) -> None:
        self.live.setdefault(record.job_id, LiveJob(record, etag, began=0.0))

    def webhook_due_in_s(self, record: JobRecord) -> float | None:
        return None

    async def file(self, record: JobRecord, etag: str) -> None:
        if record.attempts > 1:
            self.recorder.records.discard_lost_clips(record)
        self.recorder.records.file_as_done(record)


class JobMachine(RuleBasedStateMachine):
    """Each rule is one step of one process; what it then knows may be stale at once."""

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.store = JudgingStore(Path(self.folder.name))
        self.records = JobRecords(self.store, now=self.now)
        self.created = 0
        self.owners = {name: self.start(name) for name in OWNERS}
        for owner, key in zip(OWNERS, KEYS, strict=True):
            self.submit(owner, key, None, False)

    def start(self, name: str) -> Owner:
        self.born_as = getattr(self, "born_as", 0) + 1
        recorder = Recorder(self.records, AtOnce(), owner=f"{name}-{self.born_as}", patience_s=0)
        return Owner(name, self.store, recorder)

    def now(self) -> datetime:
        return datetime(2026, 11, 25, tzinfo=UTC) + timedelta(seconds=self.store.seconds)

    def await_(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def drive(self, owner: str, live: LiveJob, work: Callable[[Recorder], Any]) -> bool:
        """One step of a job in its owner's hands, as the job service takes it. Returns whether it was done."""
        mine = self.owners[owner]
        self.store.writer = mine.recorder.owner
        try:
            self.await_(work(mine.recorder))
        except Lost:
            del mine.live[live.job_id]
            if live.started:  # before that the attempt's token may be another's too
                self.records.discard_clip(live.record)
            return False
        except (JobCancelled, StoreUnavailable):
            live.stopping = True
            return False
        finally:
            self.store.fault = self.store.writer = None
        return True

    def in_hand(self, *states: JobState) -> list[tuple[str, LiveJob]]:
        """Jobs that an owner takes to be its own and in one of these states, and that go on."""
        return [(name, live) for name, live in self.all_in_hand(*states) if not live.stopping]

    def all_in_hand(self, *states: JobState) -> list[tuple[str, LiveJob]]:
        """The same, and those that can only end."""
        mine = [(name, live) for name, owner in self.owners.items() for live in owner.live.values()]
        return [(name, live) for name, live in mine if live.record.state in states]

    # ---- rules: the life of a job

    @rule(owner=owners, key=idempotency_keys, fault=faults, killed=st.booleans())
    def submit(self, owner: str, key: str, fault: str | None, killed: bool) -> None:
        job_id, created = job_id_of(key), self.now() + timedelta(milliseconds=self.created)
        self.created += 1
        record = JobRecord(
            job_id=job_id,
            request_id="request",
            state=JobState.QUEUED,
            created_at=created,
            at={JobState.QUEUED: created},
            attempt_token=f"first{self.created}",
            request=REQUEST,
            parameters=RANDOM_WAN.resolve(REQUEST),
            model=RANDOM_WAN.name,
            prompt_hash="hash",
        )
        if killed:  # between the entry and the record
            self.store.put(active_key(record.principal, entry_of(record)), b"")
            return
        self.store.fault = fault
        with suppress(PreconditionFailed, StoreUnavailable):
            etag = self.records.create(record)
            if not self.owners[owner].is_live(job_id):
                self.owners[owner].adopt(record, etag)
        self.store.fault = None

    @precondition(lambda self: self.in_hand(*UNENDED))
    @rule(which=choices, fault=faults)
    def claim(self, which: int, fault: str | None) -> None:
        found = self.in_hand(*UNENDED)
        owner, live = found[which % len(found)]
        self.store.fault = fault
        self.drive(owner, live, lambda recorder: recorder.claim(live))

    @precondition(lambda self: self.in_hand(JobState.QUEUED))
    @rule(which=choices)
    def claim_and_begin(self, which: int) -> None:
        found = self.in_hand(JobState.QUEUED)
        owner, live = found[which % len(found)]
        if self.drive(owner, live, lambda recorder: recorder.claim(live)):
            live.started = True
            self.drive(owner, live, lambda recorder: recorder.move(live, JobState.RUNNING))

    @precondition(lambda self: self.in_hand(JobState.PREPARING))
    @rule(which=choices, fault=faults)
    def begin(self, which: int, fault: str | None) -> None:
        found = self.in_hand(JobState.PREPARING)
        owner, live = found[which % len(found)]
        live.started = True
        self.store.fault = fault
        self.drive(owner, live, lambda recorder: recorder.move(live, JobState.RUNNING))

    @precondition(lambda self: self.all_in_hand(*UNENDED[1:]))
    @rule(which=choices, fault=faults)
    def renew(self, which: int, fault: str | None) -> None:
        found = self.all_in_hand(*UNENDED[1:])
        owner, live = found[which % len(found)]
        self.store.fault = fault
        self.drive(owner, live, lambda recorder: recorder.renew(live, live.progress))

    @precondition(lambda self: self.all_in_hand(*UNENDED))
    @rule(which=choices, fault=faults, state=st.sampled_from(ENDS), files=st.booleans())
    def end(self, which: int, fault: str | None, state: JobState, files: bool) -> None:
        found = self.in_hand(JobState.RUNNING) if state is JobState.SUCCEEDED else self.all_in_hand(*UNENDED)
        if not found:
            return
        owner, live = found[which % len(found)]
        changes: Any = {"lease": None}
        if state is JobState.SUCCEEDED:
            clip = clip_key(live.record.clip_id, live.record.attempt_token)
            with suppress(PreconditionFailed):
                self.store.put(clip, b"clip", if_none_match=True)
            changes["result"] = RenderedClip(key=clip, size_bytes=4, sha256="0" * 64, timings=Timings(total=1))
        self.store.fault = fault
        if self.drive(owner, live, lambda recorder: recorder.move(live, state, **changes)):
            del self.owners[owner].live[live.job_id]
            if files:  # or it was killed before
                self.await_(self.owners[owner].file(live.record, live.etag or ""))
        elif live.job_id in self.owners[owner].live:  # the store could not be told: its lease runs out
            del self.owners[owner].live[live.job_id]

    @precondition(lambda self: self.in_hand(*UNENDED[1:]))
    @rule(which=choices, fault=faults)
    def hand_back(self, which: int, fault: str | None) -> None:
        found = self.in_hand(*UNENDED[1:])
        owner, live = found[which % len(found)]
        self.store.fault = fault
        self.drive(owner, live, lambda recorder: recorder.move(live, JobState.QUEUED, lease=None))
        self.owners[owner].live.pop(live.job_id, None)

    # ---- rules: others, who hold nothing

    def cancel_elsewhere(self, key: str) -> None:
        with suppress(JobNotFound, Deleted, PreconditionFailed):
            record, etag = self.records.get(job_id_of(key))
            if record.state is JobState.QUEUED:
                self.records.write(self.records.cancelled(record), etag)
            elif not record.state.is_terminal and not record.cancel_requested:
                self.records.write(self.records.amended(record, cancel_requested=True), etag)

    def delete_now(self, key: str) -> None:
        with suppress(JobNotFound, Deleted, PreconditionFailed):
            record, etag = self.records.get(job_id_of(key))
            if record.state.is_terminal:
                self.records.delete(record, etag)

    @rule(key=idempotency_keys)
    def cancel(self, key: str) -> None:
        self.cancel_elsewhere(key)

    @rule(key=idempotency_keys, fault=faults)
    def delete(self, key: str, fault: str | None) -> None:
        self.store.fault = fault  # a tombstone, and what it stands for not yet buried
        with suppress(StoreUnavailable):
            self.delete_now(key)
        self.store.fault = None

    @rule(key=idempotency_keys, what=st.sampled_from(["cancel", "delete"]))
    def somebody_is_faster_than_the_next_write(self, key: str, what: str) -> None:
        self.store.meanwhile = lambda: {"cancel": self.cancel_elsewhere, "delete": self.delete_now}[what](key)

    @rule(owner=owners, fault=faults)
    def sweep(self, owner: str, fault: str | None) -> None:
        self.store.sweeping, self.store.fault = True, fault
        with suppress(StoreUnavailable):
            self.await_(self.owners[owner].sweeper.sweep())
        self.store.sweeping, self.store.fault = False, None

    @rule(owner=owners)
    def sweep_and_again_after_a_lease(self, owner: str) -> None:
        for _ in range(2):
            self.sweep(owner, None)
            self.store.seconds += LEASE_S
        self.sweep(owner, None)

    @rule(owner=owners)
    def kill(self, owner: str) -> None:
        self.owners[owner] = self.start(owner)

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 3, LEASE_S, 3 * LEASE_S, 20 * MIN_ORPHAN_S]))
    def time_passes(self, seconds: float) -> None:
        """Whoever makes no step meanwhile was frozen."""
        self.store.seconds += seconds

    @rule()
    def collect_garbage(self) -> None:
        """Without a time of grace, as if every attempt took longer than that."""
        Upkeep(self.store, self.records, BatchRecords(self.store), now=much_later).collect_garbage(None)

    # ---- what always holds

    def stored(self) -> dict[str, JobRecord | Tombstone]:
        found: dict[str, JobRecord | Tombstone] = {}
        for key in KEYS:
            with suppress(JobNotFound):
                try:
                    found[key] = self.records.get(job_id_of(key))[0]
                except Deleted as deleted:
                    found[key] = deleted.tombstone
        return found

    def keys(self, prefix: str) -> list[str]:
        return [stat.key for stat in self.store.list(prefix).stats]

    @precondition(lambda self: hasattr(self, "store"))
    @invariant()
    def a_job_that_has_not_ended_is_active(self) -> None:
        active = self.keys("active/")
        for record in self.stored().values():
            if not record.state.is_terminal:
                assert active_key(record.principal, entry_of(record)) in active

    @precondition(lambda self: hasattr(self, "store"))
    @invariant()
    def a_clip_that_a_record_names_is_there(self) -> None:
        clips = self.keys("clips/")
        for record in self.stored().values():
            if isinstance(record, JobRecord) and record.result is not None:
                assert record.result.key in clips

    @precondition(lambda self: hasattr(self, "store"))
    @invariant()
    def an_owner_s_lease_is_on_record_while_it_works(self) -> None:
        for record in self.stored().values():
            if isinstance(record, JobRecord):
                assert (record.lease is not None) == record.state.is_owned

    # ---- the end: everybody is killed, and one that comes later sees to it all

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            self.all_is_seen_to()
        finally:
            self.loop.close()
            self.folder.cleanup()

    def all_is_seen_to(self) -> None:
        self.store.fault = self.store.meanwhile = None
        last = self.start("ada")
        self.owners = {"ada": last}
        for _ in range(6):
            self.store.sweeping = True
            self.await_(last.sweeper.sweep())
            self.store.sweeping = False
            while last.live:
                self.claim(0, None)
                self.begin(0, None)
                self.end(0, None, JobState.SUCCEEDED, True)
            self.store.seconds += 11 * MIN_ORPHAN_S
        assert self.keys("active/") == []
        for key in KEYS:  # a list that meets what a delete has left does so, and the next delete
            try:
                self.records.get(job_id_of(key))
            except Deleted as deleted:
                self.records.bury(deleted.tombstone)
        self.collect_garbage()
        records = self.stored().values()
        named = [record.result.key for record in records if isinstance(record, JobRecord) and record.result is not None]
        assert self.keys("clips/") == sorted(named)
        done = set(self.keys("done/"))
        for record in self.stored().values():
            assert record.state.is_terminal
            filed = [done_key(record.principal, state, entry_of(record)) for state in ENDS]
            expected = [done_key(record.principal, record.state, entry_of(record))]
            assert [key for key in filed if key in done] == (expected if isinstance(record, JobRecord) else [])


def much_later() -> datetime:
    return datetime.now(UTC) + timedelta(days=1)


def job_id_of(key: str) -> str:
    return job_id_from({"one": "1", "two": "2", "three": "3"}[key] * 32)


TestJobMachine = JobMachine.TestCase
TestJobMachine.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
