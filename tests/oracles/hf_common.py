"""transformers' own common model tests, run against glmtune's ChatGLM-6B.

They are no part of the transformers wheel, so this file runs only where they are pointed at; without that it skips:

    pip download --no-deps --no-binary :all: transformers==5.23.0     # its sdist holds tests/test_*_common.py
    # tests/generation/ and tests/exporters/ come from a checkout of the same version
    GLMTUNE_TRANSFORMERS_TESTS=<checkout>/tests python -m pytest tests/oracles/hf_common.py -o addopts= -p no:warnings

Also needed: `parameterized`.
"""

import os
import unittest
from unittest import mock

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

import tests
from glmtune.families.chatglm1 import ChatGLM1Config, ChatGLM1ForCausalLM, ChatGLM1Model

FOLDER = os.environ.get("GLMTUNE_TRANSFORMERS_TESTS")
if not FOLDER:
    pytest.skip("GLMTUNE_TRANSFORMERS_TESTS does not name the tests/ of a transformers checkout", allow_module_level=True)

tests.__path__.append(FOLDER)  # they import each other as `tests.…`, which is our own package here

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

# Low ids: tests that shrink the vocabulary clamp the ids.
VOCAB, PAD, GMASK, SOP, EOP, MASK, FIRST_TEXT = 99, 3, 4, 5, 6, 7, 8
PROMPT = 6  # columns up to and with <sop>

# The mixins know by these tables which class is a base model and which wants labels.
MODEL_MAPPING_NAMES["chatglm1"] = "ChatGLM1Model"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["chatglm1"] = "ChatGLM1ForCausalLM"

# Tests whose own inputs this architecture cannot read.
NO_SOP = "its rows hold no [gMASK] <sop>, which tell ChatGLM-6B positions and mask: a clear error instead"
ONE_COORDINATE = "passes one rotary coordinate; ChatGLM-6B has two"
ONLY_EMBEDS = "passes embeddings without ids or positions: nothing tells where <sop> is; a clear error instead"
NOT_APPLICABLE = {
    "test_generate_without_input_ids": NO_SOP,
    "test_prepare_inputs_for_generation_kwargs_forwards": NO_SOP,
    "test_left_padding_compatibility": ONE_COORDINATE + " (tests/test_chatglm1.py holds the property)",
    "test_model_forward_default_config_values": "it moves bos_token_id, so that " + NO_SOP,
    "test_inputs_embeds": ONLY_EMBEDS,
    "test_generate_continue_from_inputs_embeds": ONLY_EMBEDS,
    "test_generate_from_inputs_embeds_0_greedy": ONLY_EMBEDS,
    "test_generate_from_inputs_embeds_1_beam_search": ONLY_EMBEDS,
}


class ChatGLM1Tester:
    """Tiny models and rows `context [gMASK] <sop> answer`, as the mixins ask for them."""

    base_model_class = ChatGLM1Model
    causal_lm_class = ChatGLM1ForCausalLM

    def __init__(self, parent):
        self.parent = parent
        self.batch_size, self.seq_length, self.is_training = 13, 9, True
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4

    def get_config(self) -> ChatGLM1Config:
        return ChatGLM1Config(
            vocab_size=VOCAB,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=512,
            bos_token_id=SOP,
            eos_token_id=EOP,
            pad_token_id=PAD,
            mask_token_id=MASK,
            gmask_token_id=GMASK,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], VOCAB - FIRST_TEXT) + FIRST_TEXT
        input_ids[:, PROMPT - 2], input_ids[:, PROMPT - 1] = GMASK, SOP
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class ChatGLM1CommonTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (ChatGLM1Model, ChatGLM1ForCausalLM)
    model_tester = None  # the mixin's property is abstract; setUp fills it in

    def setUp(self):
        if self._testMethodName in NOT_APPLICABLE:
            self.skipTest(NOT_APPLICABLE[self._testMethodName])
        self.model_tester = ChatGLM1Tester(self)
        self.config_tester = ConfigTester(self, config_class=ChatGLM1Config, hidden_size=32)

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        row = super()._create_text_training_batch(1, seq_length, vocab_size)["input_ids"]
        row[row < FIRST_TEXT] += 20
        row[:, PROMPT - 2], row[:, PROMPT - 1] = GMASK, SOP
        self.learned_row = row
        return {"input_ids": row.repeat(batch_size, 1), "labels": row.repeat(batch_size, 1)}

    def test_training_overfit(self):
        """The mixin prompts with the first token alone; here the prompt is everything up to <sop>."""
        generate = ChatGLM1ForCausalLM.generate

        def from_prompt(model, ids, max_new_tokens, **kwargs):
            return generate(model, self.learned_row[:, :PROMPT], max_new_tokens=max_new_tokens + 1 - PROMPT, **kwargs)

        with mock.patch.object(ChatGLM1ForCausalLM, "generate", from_prompt):
            super().test_training_overfit()

    def test_inputs_embeds_matches_input_ids(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        super().test_inputs_embeds_matches_input_ids(position_ids=ChatGLM1Model(config).make_position_ids(inputs["input_ids"]))

    def test_config(self):
        self.config_tester.run_common_tests()
