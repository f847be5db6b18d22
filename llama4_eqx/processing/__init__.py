"""Chats, texts and images to the model's inputs, and token ids back to text; runs on the host."""

from llama4_eqx.processing.batch import Batch as Batch
from llama4_eqx.processing.batch import collate as collate
from llama4_eqx.processing.chat import encode_chat as encode_chat
from llama4_eqx.processing.chat import format_chat as format_chat
from llama4_eqx.processing.chat_template import load_chat_template as load_chat_template
from llama4_eqx.processing.image_files import ImageSource as ImageSource
from llama4_eqx.processing.image_files import load_image as load_image
from llama4_eqx.processing.images import ImageProcessor as ImageProcessor
from llama4_eqx.processing.images import TiledImage as TiledImage
from llama4_eqx.processing.images import draw_tiles as draw_tiles
from llama4_eqx.processing.inputs import Inputs as Inputs
from llama4_eqx.processing.inputs import assistant_mask as assistant_mask
from llama4_eqx.processing.inputs import process as process
from llama4_eqx.processing.messages import ImagePart as ImagePart
from llama4_eqx.processing.messages import Message as Message
from llama4_eqx.processing.messages import ToolCall as ToolCall
from llama4_eqx.processing.tokenizer import Tokenizer as Tokenizer
from llama4_eqx.processing.tokenizer import TokenStream as TokenStream
from llama4_eqx.processing.tokenizer_files import load_tokenizer as load_tokenizer
from llama4_eqx.processing.tokenizer_json import byte_tokenizer as byte_tokenizer
from llama4_eqx.processing.tools import parse_assistant_message as parse_assistant_message
from llama4_eqx.processing.tools import parse_tool_calls as parse_tool_calls
from llama4_eqx.processing.tools import tool_schema as tool_schema
