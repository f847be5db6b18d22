"""Generating text: prefill, decoding steps, the whole loop, and samplers; and scoring it."""

from llama4_eqx.generation.decoding import Request as Request
from llama4_eqx.generation.decoding import decode_step as decode_step
from llama4_eqx.generation.decoding import generate as generate
from llama4_eqx.generation.decoding import prefill as prefill
from llama4_eqx.generation.decoding import stream as stream
from llama4_eqx.generation.sampling import Greedy as Greedy
from llama4_eqx.generation.sampling import Sample as Sample
from llama4_eqx.generation.sampling import Sampler as Sampler
from llama4_eqx.generation.scoring import Loglikelihood as Loglikelihood
from llama4_eqx.generation.scoring import TokenScores as TokenScores
from llama4_eqx.generation.scoring import loglikelihood as loglikelihood
from llama4_eqx.generation.scoring import token_logprobs as token_logprobs
from llama4_eqx.generation.scoring import token_scores as token_scores
