"""What tokenizes what is prepared."""

from data.chat_template import ChatTemplate
from data.chats import ChatEncoder
from data.config import PrepareConfig
from data.encoding import Encoder, TextEncoder
from data.pairs import PairEncoder
from data.tokenizer import Tokenizer


def encoder_of(config: PrepareConfig, tokenizer: Tokenizer, sequence_length: int) -> Encoder:
    """What tokenizes the documents that are prepared; of chats and pairs, with the template beside the tokenizer."""
    if config.content == "text":
        return TextEncoder(tokenizer, config.lossy_tokenizer)
    kind = ChatEncoder if config.content == "chats" else PairEncoder
    return kind(ChatTemplate(tokenizer), sequence_length + 1, config.too_long)
