"""What the keys of a `config.json` mean that are no plain fields of the configuration."""

from __future__ import annotations

import math

# Keys that may be absent, as in the released files; the value is what absence means.
OPTIONAL = {
    "time_step_limit": (0.0, math.inf),
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.02,
}

# Keys that say nothing about the forward pass: read by other programs, or by trainers only. The
# second block is of sampling and beams, the third of the classifier heads that PretrainedConfig
# serves too.
IGNORED = frozenset(
    "architectures model_type auto_map transformers_version unsloth_version peft_version "
    "trl_version torch_dtype dtype use_cache num_logits_to_keep mlp_expansion_factor time_step_min "
    "time_step_max time_step_floor output_attentions output_hidden_states return_dict "
    "chunk_size_feed_forward is_encoder_decoder is_decoder torchscript tf_legacy_loss "
    "attn_implementation gradient_checkpointing tokenizer_class prefix custom_pipelines "
    "sep_token_id decoder_start_token_id unsloth_fixed pretraining_tp transformers.js_config "
    "use_mamba_kernels name_or_path trust_remote_code experts_implementation "
    #
    "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    #
    "problem_type id2label label2id num_labels finetuning_task task_specific_params".split()
)
# Keys that are accepted with the one value that changes nothing.
NEUTRAL = {
    "pruned_heads": {},
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "use_bfloat16": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
}

# Keys accepted with one value only, because the package has no code for another one.
REQUIRED_VALUES = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "attn_layer_indices": None,
    "mamba_use_mlp": True,
}

# What null means in a key of the architecture, where it means anything: as in transformers.
NULL_VALUES = {
    "mamba_conv_bias": False,
    "mamba_proj_bias": False,
    "projectors_bias": False,
    "mamba_rms_norm": False,
    "mamba_norm_before_gate": False,
    "ssm_multipliers": (1.0,) * 5,
    "mlp_multipliers": (1.0,) * 2,
}

# What the writer puts into every config.json: nothing to be told of.
OWN = frozenset(["architectures", "model_type", "dtype", "torch_dtype", "rope_scaling"])
OWN |= REQUIRED_VALUES.keys()
