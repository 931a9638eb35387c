"""Seed-OSS: LLaMA's blocks under other names of classes, with biases on query, key and value."""

from dataclasses import replace

from swquant.families.llama import LLAMA

SEED_OSS = replace(LLAMA, name="seed_oss", architectures=("SeedOssForCausalLM",), base_architectures=("SeedOssModel",))
