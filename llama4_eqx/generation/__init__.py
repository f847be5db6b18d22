"""Generating text: prefill, decoding steps, whole loops, samplers, processors; and scoring."""

from llama4_eqx.generation.beam_search import BeamSearch as BeamSearch
from llama4_eqx.generation.beam_search import beam_search as beam_search
from llama4_eqx.generation.decoding import Generation as Generation
from llama4_eqx.generation.decoding import decode_step as decode_step
from llama4_eqx.generation.decoding import generate as generate
from llama4_eqx.generation.decoding import generate_output as generate_output
from llama4_eqx.generation.decoding import prefill as prefill
from llama4_eqx.generation.decoding import stream as stream
from llama4_eqx.generation.processors import Automaton as Automaton
from llama4_eqx.generation.processors import BannedTokens as BannedTokens
from llama4_eqx.generation.processors import ForcedTokens as ForcedTokens
from llama4_eqx.generation.processors import FrequencyPenalty as FrequencyPenalty
from llama4_eqx.generation.processors import LogitsProcessor as LogitsProcessor
from llama4_eqx.generation.processors import NoRepeatNgram as NoRepeatNgram
from llama4_eqx.generation.processors import PresencePenalty as PresencePenalty
from llama4_eqx.generation.processors import RepetitionPenalty as RepetitionPenalty
from llama4_eqx.generation.request import Request as Request
from llama4_eqx.generation.sampling import Greedy as Greedy
from llama4_eqx.generation.sampling import Sample as Sample
from llama4_eqx.generation.sampling import Sampler as Sampler
from llama4_eqx.generation.scoring import Loglikelihood as Loglikelihood
from llama4_eqx.generation.scoring import TokenScores as TokenScores
from llama4_eqx.generation.scoring import loglikelihood as loglikelihood
from llama4_eqx.generation.scoring import token_logprobs as token_logprobs
from llama4_eqx.generation.scoring import token_scores as token_scores
