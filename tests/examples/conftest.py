"""A Llama of two small layers, with random weights: what the engine does in seconds."""

import pytest
import torch
import transformers

from examples.eagle_head import layout
from examples.eagle_head.head import EagleHead
from examples.serving.llama import Llama

VOCAB = 19


@pytest.fixture(scope="session")
def network(hw):
    """transformers' Llama: what ours is compared with."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,  # wide: the answers wander instead of repeating one token
    )
    return transformers.LlamaForCausalLM(config).eval().to(hw.device())


@pytest.fixture(scope="session")
def llama(hw, network):
    """Our own Llama with the same weights, on the device."""
    return Llama(network.config, network.state_dict(), hw.device(), max_context=512)


@pytest.fixture(scope="session")
def head(llama) -> EagleHead:
    """A head of random weights, which knows all tokens: right now and then."""
    torch.manual_seed(3)
    size, width = llama.embedding.shape[1], llama.width
    shape = layout.Shape(
        hidden=size,
        heads=llama.heads,
        kv_heads=llama.kv_heads,
        width=width,
        inner=64,
        vocab=VOCAB,
        draft_vocab=VOCAB,
        theta=1e4,
        epsilon=1e-6,
        taps=(0, 1),
    )
    weights = {name: torch.randn(sizes) * 0.2 for name, sizes in shape.matrices().items()}
    weights |= {name: torch.ones(size) for name in shape.norms()}
    weights["lm_head.weight"] = torch.randn(VOCAB, size)
    return EagleHead(shape, weights, torch.arange(VOCAB), llama.embedding, 512)


@pytest.fixture
def sim(hw):
    """Control over the simulated device, for what no other one shows."""
    if hw.info.name != "sim":
        pytest.skip("the device does not tell what the host waits for, nor when work runs")
    from hwcore_sim import device

    return device
