"""A pipeline's VAE and text encoders, and what its folder may lack."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from support import caching, pipelines
from support.models import BACKBONES

from edit_core.distill import encoders as encoders_module
from edit_core.distill.encoders import PipelineEncoder
from edit_core.distill.teacher import load_teacher
from edit_core.errors import EDiTError

folders = caching.folders
encoders = caching.encoders


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_tiny_pipelines_are_whole(backbone: str, folders: dict[str, Path]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folders[backbone], local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_inference_steps": 2}
    if backbone.startswith("pixart"):
        size.update(use_resolution_binning=False, clean_caption=False)
    first, second = (np.array(pipeline(text, generator=torch.Generator().manual_seed(0), **size).images[0])
                     for text in ("a red fox in the snow", "two ships at sea"))  # fmt: skip
    assert first.shape == (64, 64, 3)
    assert (first != second).any()


def test_the_vae_stays_in_float32_and_text_takes_the_dtype(folders: dict[str, Path]) -> None:
    full = PipelineEncoder(folders["pixart_sigma"], torch.device("cpu"), torch.float32)
    half = PipelineEncoder(folders["pixart_sigma"], torch.device("cpu"), torch.bfloat16)
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(half.encode_images(pixels), full.encode_images(pixels))
    assert half.encode_prompts(["a fox"])["prompt_embeds"].dtype == torch.bfloat16
    assert half.fingerprint != full.fingerprint


def test_long_captions_are_cut_as_the_pipeline_cuts_them(
    encoders: dict[str, PipelineEncoder], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for encoder in encoders.values():
        long, short = encoder.encode_prompts(["ships at sea " * 500, "ships"])["prompt_embeds"]
        assert long.shape == short.shape
    assert capfd.readouterr().err == ""
    assert not caplog.records


def test_captions_past_each_limit_are_named(encoders: dict[str, PipelineEncoder]) -> None:
    for words, pixart, sd35 in ((5, [], []), (100, [], ["CLIP's 77 tokens"]),
                                (280, [], ["CLIP's 77 tokens", "T5's 256 tokens"]),
                                (400, ["T5's 300 tokens"], ["CLIP's 77 tokens", "T5's 256 tokens"])):  # fmt: skip
        caption = "ships " * words
        assert (encoders["pixart_sigma"].too_long(caption), encoders["sd35_medium"].too_long(caption)) == (pixart, sd35)
    tokens = encoders["pixart_sigma"].pipeline.tokenizer("ships " * 299).input_ids
    assert len(tokens) == 300  # with the end, all that is read
    assert not encoders["pixart_sigma"].too_long("ships " * 299)
    assert encoders["pixart_sigma"].too_long("ships " * 300)


@pytest.mark.parametrize("caption", ["ships & sea", "“ships” at sea", "1024x768 ships", "ships 狐"])
def test_captions_are_cleaned_where_the_pipeline_cleans_them(
    caption: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as module

    cpu = torch.device("cpu")
    plain = PipelineEncoder(folders["pixart_sigma"], cpu, torch.float32)
    for name in ("is_bs4_available", "is_ftfy_available"):
        monkeypatch.setattr(module, name, lambda: True)
    monkeypatch.setattr(
        module.PixArtSigmaPipeline, "_clean_caption", lambda _, text: "".join(filter(str.isascii, text)).strip(" &x")
    )
    monkeypatch.setattr(encoders_module, "cleans_captions", lambda: True)
    encoder = PipelineEncoder(folders["pixart_sigma"], cpu, torch.float32)
    assert encoder.fingerprint != plain.fingerprint  # a cache goes on with what it was begun with
    pipeline = DiffusionPipeline.from_pretrained(folders["pixart_sigma"], local_files_only=True)
    seen: dict[str, torch.Tensor] = {}

    def noted(*_: object, **kwargs: torch.Tensor) -> None:
        seen.update(kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.transformer, "forward", noted)
    with pytest.raises(KeyboardInterrupt):
        pipeline(caption, height=64, width=64, num_inference_steps=1, use_resolution_binning=False, guidance_scale=1)
    torch.testing.assert_close(encoder.encode_prompts([caption])["prompt_embeds"], seen["encoder_hidden_states"])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_folder_of_one_variant_alone_is_loaded_and_of_several_is_refused(
    backbone: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folders[backbone], local_files_only=True)
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
    assert len(list(tmp_path.glob("text_encoder/model.fp16-*.safetensors"))) > 1
    cpu = torch.device("cpu")
    plain, variant = (PipelineEncoder(folder, cpu, torch.float32) for folder in (folders[backbone], tmp_path))
    assert variant.fingerprint == plain.fingerprint
    state, expected = (load_teacher(f, torch.float32, cpu).state_dict() for f in (tmp_path, folders[backbone]))
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    pipeline.save_pretrained(tmp_path, variant="bf16")
    for load in (
        lambda: PipelineEncoder(tmp_path, cpu, torch.float32),
        lambda: load_teacher(tmp_path, torch.float32, cpu),
    ):
        with pytest.raises(EDiTError, match="are there as the variants bf16, fp16 alone"):
            load()
    pipeline.save_pretrained(tmp_path)
    assert PipelineEncoder(tmp_path, cpu, torch.float32).fingerprint == plain.fingerprint


def test_an_incomplete_pipeline_is_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    def load(folder: Path) -> PipelineEncoder:
        return PipelineEncoder(folder, torch.device("cpu"), torch.float32)

    def copy(backbone: str, name: str) -> Path:
        return shutil.copytree(folders[backbone], tmp_path / name)

    for backbone, part in (("pixart_sigma", "vae"), ("pixart_sigma", "text_encoder"), ("sd35_medium", "vae"),
                           ("sd35_medium", "text_encoder_2"), ("sd35_medium", "text_encoder_3")):  # fmt: skip
        folder = copy(backbone, f"{backbone}-{part}")
        shutil.rmtree(folder / part)
        with pytest.raises(EDiTError, match=rf"but {part} is missing; found model_index.json, scheduler") as caught:
            load(folder)
        assert str(folder) in str(caught.value)

    folder = copy("sd35_medium", "null")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(EDiTError, match="but text_encoder_3 is missing"):
        load(folder)
    index["_class_name"] = "FluxPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(EDiTError, match="is a FluxPipeline, and a cache needs PixArtAlphaPipeline or PixArtSigma"):
        load(folder)
    (folder / "model_index.json").write_text("[")
    with pytest.raises(EDiTError, match=r"model_index.json: cannot be read"):
        load(folder)
    with pytest.raises(EDiTError, match=r"not a diffusers pipeline's folder, which has a model_index.json; found no"):
        load(tmp_path / "none")

    folder = copy("pixart_sigma", "mute")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(EDiTError, match=r"holds no vocabulary; found tokenizer_config.json"):
        load(folder)

    folder = copy("pixart_sigma", "cut")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EDiTError, match="its VAE or text encoders cannot be loaded"):
        load(folder)


def test_a_tokenizer_as_the_published_pixart_has_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`spiece.model` alone, which transformers can convert only with two more libraries."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder = shutil.copytree(folders["pixart_sigma"], tmp_path / "p")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([pipelines.WORDS] * 20), model_writer=model, vocab_size=32, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer" / "spiece.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = PipelineEncoder(folder, torch.device("cpu"), torch.float32)
    expected = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode("a red fox", add_eos=True)
    assert encoder.pipeline.tokenizer("a red fox").input_ids == expected
    assert int(encoder.encode_prompts(["a red fox"])["prompt_mask"].sum()) == len(expected)
    monkeypatch.setattr(encoders_module, "_installed", lambda module: module != "google.protobuf")
    with pytest.raises(EDiTError, match=r"spiece.model needs protobuf: install it"):
        PipelineEncoder(folder, torch.device("cpu"), torch.float32)


def test_numbers_that_are_not_finite_are_refused(folders: dict[str, Path]) -> None:
    encoder = PipelineEncoder(folders["pixart_sigma"], torch.device("cpu"), torch.float32)
    next(encoder.vae.parameters()).data.fill_(torch.nan)
    with pytest.raises(EDiTError, match="its VAE give numbers that are not finite"):
        encoder.encode_images(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    next(encoder.pipeline.text_encoder.parameters()).data.fill_(torch.nan)
    with pytest.raises(EDiTError, match=r"its text encoders give numbers that are not finite in torch.float32"):
        encoder.encode_prompts(["x"])
