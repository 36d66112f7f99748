"""What tokenizes what is prepared."""

from data.chat_template import ChatTemplate
from data.chats import ChatEncoder
from data.config import PrepareConfig
from data.decontamination import NGrams
from data.encoding import Encoder, TextEncoder
from data.filters import FilteringEncoder, Filters
from data.pairs import PairEncoder
from data.tokenizer import Tokenizer


def encoder_of(
    config: PrepareConfig, tokenizer: Tokenizer, sequence_length: int, ngrams: NGrams | None = None
) -> Encoder:
    """What tokenizes the documents that are prepared; of chats and pairs, with the template beside the tokenizer."""
    encoder: Encoder
    if config.content == "text":
        encoder = TextEncoder(tokenizer, config.lossy_tokenizer)
    else:
        kind = ChatEncoder if config.content == "chats" else PairEncoder
        encoder = kind(ChatTemplate(tokenizer), sequence_length + 1, config.too_long)
    filters = Filters.of(config, ngrams)
    return FilteringEncoder(encoder, filters) if filters else encoder
