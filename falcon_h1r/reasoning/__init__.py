"""Answers by a vote of traces: confidences, DeepConf's policies, trace records and replay."""

from .answers import (
    Candidate,
    Equality,
    Verdict,
    Vote,
    group,
    vote,
)
from .confidence import (
    MEASURES,
    Measures,
    RunningConfidence,
    confidence_of_logits,
    first_below,
    group_confidences,
    token_confidence,
    trace_measures,
)
from .deepconf import PRESETS, Ballot, DeepConf, Offline, offline_vote
from .extract import EXTRACTORS, last_boxed, make_extractor
from .live import LiveRun, Question, fitting_window, tokens_of_all
from .notation import normal_form
from .online import Ended, Event, OnlinePolicy, OnlineResult, Outcome
from .openai import import_responses, read_responses
from .plain import PlainPolicy
from .plot import wilson_interval
from .recorder import TraceRecorder
from .replay import POLICIES, Replayed, make_policy, recorded_policy, replay
from .traces import Manifest, Record, RecordedTrace, find_records, read_record

__all__ = [
    "EXTRACTORS",
    "MEASURES",
    "POLICIES",
    "PRESETS",
    "Ballot",
    "Candidate",
    "DeepConf",
    "Ended",
    "Equality",
    "Event",
    "LiveRun",
    "Manifest",
    "Measures",
    "Offline",
    "OnlinePolicy",
    "OnlineResult",
    "Outcome",
    "PlainPolicy",
    "Question",
    "Record",
    "RecordedTrace",
    "Replayed",
    "RunningConfidence",
    "TraceRecorder",
    "Verdict",
    "Vote",
    "confidence_of_logits",
    "find_records",
    "first_below",
    "fitting_window",
    "group",
    "group_confidences",
    "import_responses",
    "last_boxed",
    "make_extractor",
    "make_policy",
    "normal_form",
    "offline_vote",
    "read_record",
    "read_responses",
    "recorded_policy",
    "replay",
    "token_confidence",
    "tokens_of_all",
    "trace_measures",
    "vote",
    "wilson_interval",
]
