"""Models that a GGUF file can carry; shared by the tests of the file and those of llama.cpp."""

from models import make_config, make_model

# Every multiplier of `models.BASE` differs from 1 and from every other one.
CASES = {
    "two_groups": {},
    "h1r_like": {},
    "tied": {},
    "no_gated_norm": {"mamba_norm_before_gate": True},  # without the norm it says nothing
    "no_conv_bias_three_taps": {},
    "d_ssm_null_auto_head": {"mlp_bias": True},
    "multi_query_odd_chunk": {"mamba_d_conv": 1},
}


def case_model(name: str):
    return make_model(make_config(name, **CASES[name]))
