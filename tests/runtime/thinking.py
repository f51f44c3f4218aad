"""Chat templates and a generation with thoughts in them."""

from __future__ import annotations

import torch
from tiny_gguf import ALPHABET, CONTROL, TEMPLATE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nearfar.runtime.text.thoughts import MARKS

SWITCH = (
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
)


QWEN3 = TEMPLATE.replace("assistant\n{% endif %}", f"assistant\n{SWITCH}{{% endif %}}")


R1 = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


HEAD = "{{ '[no thinking]' if thinking is false }}" + TEMPLATE


def library(special: bool) -> Tokenizer:
    made = Tokenizer(models.BPE({each: i for i, each in enumerate([*CONTROL, *ALPHABET])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(each, normalized=False) for each in CONTROL])
    marks = [each for pair in MARKS for each in pair]
    made.add_tokens([AddedToken(each, normalized=False, special=special) for each in marks])
    return made


class Says:
    """Draws ``ids`` one after another, whatever was read."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = list(ids)

    def sample(self, _logits: torch.Tensor) -> int:
        return self._ids.pop(0)
