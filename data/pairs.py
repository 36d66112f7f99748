"""Pairs of answers as training data: two chats in one row, the chosen answer's and then the rejected one's.

A pair is packed as one, so that rows hold whole pairs. Each of its two chats is the prompt and an answer, sees itself
alone, and only the answer counts (`data.marks`). Nothing else is needed to find the pairs of a row again: its chats
are chosen and rejected in turns, and padding, after the last, counts nowhere.

Tokens are those of TRL's `DPOTrainer`. Of messages, the prompt is rendered up to where generation would begin, and all
that the template writes after it is the answer. Text is taken as it is; as everywhere in Tritrain, it begins and ends
with the token that ends documents.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.chat_records import TOOLS_KEY
from data.chat_template import Tools
from data.chats import ChatEncoder
from data.errors import DataError
from data.marks import with_marks
from data.pair_records import PROMPT_KEY, SIDES
from data.spans import inside


class PairEncoder(ChatEncoder):
    """Tokenizes pairs."""

    noun = "pair"

    def marked(self, record: Any) -> NDArray[np.uint32]:
        """The tokens of both chats of a pair, with marks.

        Raises:
            DataError: the template refuses one, or does not write its prompt as it does alone; or the answers are equal
                as tokens.
        """
        tools = record.get(TOOLS_KEY)
        sides = [self._side(record[PROMPT_KEY], record[side], tools, side) for side in SIDES]
        if np.array_equal(sides[0], sides[1]):
            raise DataError("chosen and rejected are the same tokens, so there is nothing to prefer; remove the pair")
        return np.concatenate(sides)

    def _side(self, prompt: Any, answer: Any, tools: Tools, side: str) -> NDArray[np.uint32]:
        tokenizer = self.template.tokenizer
        if isinstance(prompt, str):
            end = tokenizer.end_of_document
            ids, spans = tokenizer.encode_special_spans(prompt + answer)
            counts = inside(spans, [(len(prompt), len(prompt) + len(answer))])
            ended = ids[-1:] == [end]
            return with_marks([end, *ids, *[end][ended:]], [False, *counts, *[True][ended:]])
        before = self.template.text(prompt, tools, to_answer=True)
        text = self.template.text([*prompt, *answer], tools, to_answer=False)
        if not text.startswith(before):
            raise DataError(
                f"the chat template does not write the prompt before the {side} answer as it does alone, so that the "
                "answer cannot be told from it; choose another --chat-template"
            )
        self.check_names(text, [*prompt, *answer])
        ids, spans = tokenizer.encode_special_spans(text)
        counts = inside(spans, [(len(before), len(text))])
        counts[:1] = False  # nothing comes before it
        if not counts.any():
            raise DataError(f"the chat template writes no {side} answer of this pair")
        return with_marks(ids, counts)
