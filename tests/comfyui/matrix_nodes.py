"""ComfyUI's own nodes that take a MODEL and that people put beside EDiT: one row each, one cell per row.

Imported by the checks inside ComfyUI and by the test outside, so it imports nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

BOTH = ("pixart_sigma", "sd35_medium")
SD35 = ("sd35_medium",)


class Row(NamedTuple):
    node: str
    file: str
    """In comfy_extras."""
    inputs: dict[str, Any]
    reaches: tuple[str, ...] = BOTH
    """The backbones that it has an effect on; it has to leave the others as they are."""
    how: dict[str, Any] = {}
    """How to sample."""
    needs: str = "0.3.64"
    """The first of the tested versions that has it."""


GUIDED = {"cfg": 3.0}
ALL_STEPS = {"start_percent": 0.0, "end_percent": 1.0}
ADVANCED = "nodes_model_advanced.py"

ROWS = {
    "rescale_cfg": Row("RescaleCFG", ADVANCED, {"multiplier": 0.7}, how=GUIDED),
    "apg": Row("APG", "nodes_apg.py", {"eta": 0.5, "norm_threshold": 5.0, "momentum": 0.0}, how=GUIDED),
    "tcfg": Row("TCFG", "nodes_tcfg.py", {}, how=GUIDED),
    "mahiro": Row("Mahiro", "nodes_mahiro.py", {}, how=GUIDED),
    "cfg_zero_star": Row("CFGZeroStar", "nodes_cfg.py", {}, how=GUIDED),
    "cfg_norm": Row("CFGNorm", "nodes_cfg.py", {"strength": 0.8}, how=GUIDED),
    "epsilon_scaling": Row("Epsilon Scaling", "nodes_eps.py", {"scaling_factor": 1.05}),
    "skip_layer_guidance_sd3": Row(
        "SkipLayerGuidanceSD3", "nodes_sd3.py", {"layers": "1", "scale": 3.0, **ALL_STEPS}, SD35, GUIDED
    ),
    "skip_layer_guidance_dit": Row(
        "SkipLayerGuidanceDiT", "nodes_slg.py",
        {"double_layers": "1", "single_layers": "", "scale": 3.0, "rescaling_scale": 0.0, **ALL_STEPS}, SD35, GUIDED,
    ),
    "skip_layer_guidance_simple": Row(
        "SkipLayerGuidanceDiTSimple", "nodes_slg.py",
        {"double_layers": "1", "single_layers": "", **ALL_STEPS}, SD35, GUIDED,
    ),
    "perturbed_attention": Row("PerturbedAttentionGuidance", "nodes_pag.py", {"scale": 3.0}, (), GUIDED),
    "hypertile": Row(
        "HyperTile", "nodes_hypertile.py",
        {"tile_size": 256, "swap_size": 2, "max_depth": 0, "scale_depth": False}, (),
    ),
    "token_merging": Row("TomePatchModel", "nodes_tomesd.py", {"ratio": 0.3}, ()),
    "normalized_attention_guidance": Row(
        "NAGuidance", "nodes_nag.py", {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5}, (), GUIDED, "0.33.0"
    ),
    "attention_backend": Row("ModelAttentionBackend", ADVANCED, {"attention": "attention_sub_quad"}, (), {}, "0.33.0"),
    "model_sampling_sd3": Row("ModelSamplingSD3", ADVANCED, {"shift": 3.0}, SD35, {"steps": 2}),
    "model_sampling_aura_flow": Row("ModelSamplingAuraFlow", ADVANCED, {"shift": 1.73}, SD35, {"steps": 2}),
    "model_sampling_flux": Row(
        "ModelSamplingFlux", ADVANCED, {"max_shift": 1.15, "base_shift": 0.5, "width": 320, "height": 272}, SD35,
        {"steps": 2},
    ),
    "model_sampling_discrete": Row(
        "ModelSamplingDiscrete", ADVANCED, {"sampling": "eps", "zsnr": True}, ("pixart_sigma",), {"steps": 2}
    ),
}  # fmt: skip
