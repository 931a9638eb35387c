"""Entries of transformers' mappings that ``families.py`` does not measure, each with the reason."""

from __future__ import annotations

ENCODER = "encoders; the causal class is the same network with another mask"
HALF = "decoders of encoder-decoders, which attend to their encoder's output"
PERMUTED = "learns the order of words by permutation, not from left to right"
SPEECH = "read or write speech"
MUSIC = "write music"
DRAFT = "drafts for another model, of whose hidden states it is a function"
WRAPPED = "made by transformers' auto class from no configuration; measured in its image-text class"
WHOLE = "encoder-decoders"
PICTURE = "take no text without a picture"
DENOISER = "denoises blocks of tokens instead of predicting the next"
PROTEIN = "takes no text without a protein"
ROBOT = "writes the movements of a robot"
CLASSIFIER = "classifies pictures"

_CAUSAL = {
    ENCODER: "bert big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm "
    "roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod",
    HALF: "bart bert-generation bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet "
    "trocr",
    PERMUTED: "xlnet",
    SPEECH: "moshi moss_transcribe_diarize whisper",
    MUSIC: "musicgen musicgen_melody",
    DRAFT: "gemma4_assistant gemma4_unified_assistant",
    WRAPPED: "emu3 mllama",
}
_IMAGE_TEXT = {
    WHOLE: "florence2 pix2struct pp_formulanet t5gemma2 udop vision-encoder-decoder",
    PICTURE: "blip blip-2 idefics instructblip instructblipvideo kosmos-2",
    DENOISER: "diffusion_gemma",
    PROTEIN: "evolla",
    ROBOT: "pi0",
    CLASSIFIER: "shieldgemma2",
}

NOT_DECODERS = {f"causal:{name}": reason for reason, names in _CAUSAL.items() for name in names.split()} | {
    f"image-text:{name}": reason for reason, names in _IMAGE_TEXT.items() for name in names.split()
}
"""From ``kind:model_type`` to why it is no decoder of text that can be measured."""
