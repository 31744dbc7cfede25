"""Tokenizer, chat templates, text as it is generated, and the reasoning block."""

from .stream import IncrementalDecoder, StopMatcher
from .template import ChatTemplateError, mend_chat_template
from .think import Piece, ThinkSplitter, split_thinking
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "ChatTemplateError",
    "IncrementalDecoder",
    "Piece",
    "StopMatcher",
    "ThinkSplitter",
    "Tokenizer",
    "load_tokenizer",
    "mend_chat_template",
    "split_thinking",
]
