"""Text and chats to token ids and back, on the host: no JAX here."""

from llama4_eqx.processing.chat import Message as Message
from llama4_eqx.processing.chat import ToolCall as ToolCall
from llama4_eqx.processing.chat import encode_chat as encode_chat
from llama4_eqx.processing.chat import format_chat as format_chat
from llama4_eqx.processing.chat import load_chat_template as load_chat_template
from llama4_eqx.processing.tokenizer import Tokenizer as Tokenizer
from llama4_eqx.processing.tokenizer import TokenStream as TokenStream
from llama4_eqx.processing.tokenizer import byte_tokenizer as byte_tokenizer
from llama4_eqx.processing.tokenizer import load_tokenizer as load_tokenizer
