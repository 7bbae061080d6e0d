"""Names of the arguments of Transformer Engine's constructors, those without a default first.

Read from the sources of Transformer Engine 2.18.0 (tag v2.18, commit 27486e03). `make first-gpu`
compares this table with the package that is installed there.
"""

_NORM = """normalized_shape eps sequence_parallel params_dtype zero_centered_gamma hidden_size
    device dtype sm_margin"""
"""The last three belong to the operation that the class extends."""

MODULES = {
    "Linear": """in_features out_features
        sequence_parallel fuse_wgrad_accumulation tp_group tp_size get_rng_state_tracker
        rng_tracker_name init_method bias return_bias params_dtype parallel_mode parameters_split
        device ub_overlap_ag ub_overlap_rs ub_overlap_rs_dgrad ub_bulk_dgrad ub_bulk_wgrad
        ub_name delay_wgrad_compute symmetric_ar_type save_original_input name""",
    "LayerNormLinear": """in_features out_features
        eps sequence_parallel fuse_wgrad_accumulation tp_group tp_size get_rng_state_tracker
        init_method bias normalization return_bias params_dtype parallel_mode
        return_layernorm_output return_layernorm_output_gathered parameters_split
        zero_centered_gamma device ub_overlap_ag ub_overlap_rs ub_overlap_rs_dgrad ub_bulk_wgrad
        ub_bulk_dgrad ub_name delay_wgrad_compute symmetric_ar_type name""",
    "GroupedLinear": """num_gemms in_features out_features
        sequence_parallel fuse_wgrad_accumulation tp_group tp_size get_rng_state_tracker
        rng_tracker_name init_method bias return_bias params_dtype parallel_mode device
        ub_overlap_rs ub_overlap_ag ub_name delay_wgrad_compute save_original_input
        single_grouped_weight single_grouped_bias name""",
    "LayerNorm": _NORM,
    "RMSNorm": _NORM,
    "DotProductAttention": """num_attention_heads kv_channels
        num_gqa_groups attention_dropout qkv_format attn_mask_type window_size
        bottom_right_diagonal sequence_parallel tp_size get_rng_state_tracker tp_group
        layer_number attention_type cp_group cp_global_ranks cp_stream cp_comm_type softmax_scale
        softmax_type return_max_logit name""",
    "Fp8Padding": "num_gemms align_size",
    "Fp8Unpadding": "num_gemms align_size",
}
"""Of transformer_engine.pytorch."""
