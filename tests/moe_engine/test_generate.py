"""Sampling: the cache changes nothing, seeds repeat, limits hold, errors name what is wrong."""

import pytest
import torch

from moe_engine import ModelConfig, Transformer
from moe_engine.generate import _choose, generate
from moe_engine.testing import parameters

CONFIG = ModelConfig(
    vocab_size=40, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=24, sliding_window=8
)
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def model():
    model = Transformer(CONFIG)
    values = parameters(model, seed=2)
    values["head.weight"] *= 2  # a peaked distribution: greedy text that does not hang on the last bit
    model.load_state_dict(values)
    return model


def _without_cache(model, prompt, count, vocab_size=None):
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1, :vocab_size].argmax()))
    return tokens[len(prompt) :]


def test_greedy_text_with_the_cache_is_the_text_without(model):
    """Forty tokens through windows of 8, sinks included."""
    expected = _without_cache(model, PROMPT, 40)
    assert len(set(expected)) > 3, "a text of one token would hide a stale cache"
    assert generate(model, PROMPT, 40, temperature=0) == expected
    assert generate(model, PROMPT * 6, 10, temperature=0) == _without_cache(model, PROMPT * 6, 10)


def test_top_1_is_greedy_at_any_temperature(model):
    expected = generate(model, PROMPT, 30, temperature=0)
    for temperature in (0.1, 1.0, 5.0):
        assert generate(model, PROMPT, 30, temperature=temperature, top_k=1, seed=4) == expected


def test_seeds_repeat_and_differ_and_leave_the_global_generator_alone(model):
    state = torch.get_rng_state()
    texts = [generate(model, PROMPT, 30, temperature=1.5, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(state, torch.get_rng_state())


def test_draws_follow_the_softmax_of_the_scaled_logits(model):
    count, temperature = 20_000, 1.3
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
    for top_k in (0, 3, 1000):
        kept = logits.clone()
        if top_k == 3:
            kept[kept < logits.topk(3).values[-1]] = -torch.inf
        probability = (kept / temperature).softmax(0)
        draws = _choose(logits.expand(count, -1), temperature, top_k, torch.Generator().manual_seed(0))
        share = torch.bincount(draws, minlength=40) / count
        deviation = (probability * (1 - probability) / count).sqrt()
        assert ((share - probability).abs() <= 5 * deviation).all()
        assert (probability > 0).sum() == (3 if top_k == 3 else 40)
        texts = [generate(model, PROMPT, 1, temperature=temperature, top_k=top_k, seed=seed) for seed in range(20)]
        assert all(probability[token] > 0 for (token,) in texts) and len({token for (token,) in texts}) > 1


def test_padding_of_the_vocabulary_is_never_drawn(model):
    everything = set()
    for seed in range(5):
        text = generate(model, PROMPT, 60, temperature=50.0, top_k=0, vocab_size=7, seed=seed)
        assert len(text) == 60 and max(text) < 7
        everything |= set(text)
    assert everything == set(range(7))
    assert max(generate(model, PROMPT, 200, temperature=50.0, top_k=0)) > 30
    assert generate(model, PROMPT, 10, temperature=0, vocab_size=7) == _without_cache(model, PROMPT, 10, vocab_size=7)


def test_stop_token_ends_the_text_and_is_not_part_of_it(model):
    text = generate(model, PROMPT, 30, temperature=1.5)
    stop = text[12]
    assert generate(model, PROMPT, 30, temperature=1.5, stop=stop) == text[: text.index(stop)]
    assert generate(model, PROMPT, 30, temperature=1.5, stop=999) == text


def test_should_stop_is_asked_before_every_token(model):
    text, asked = generate(model, PROMPT, 30), []

    def after_five():
        asked.append(None)
        return len(asked) > 5

    assert generate(model, PROMPT, 30, should_stop=after_five) == text[:5]
    assert generate(model, PROMPT, 30, should_stop=lambda: True) == []


def test_no_new_token_and_other_types(model):
    assert generate(model, PROMPT, 0) == []
    wide = Transformer(CONFIG).bfloat16()
    assert len(generate(wide, PROMPT, 12)) == 12  # keys and values of the parameters' dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt: expected at least one token"),
        ({"prompt": [1, 100_000]}, r"prompt: expected ids from 0 to \d+, got \[1, 100000\]"),
        ({"temperature": -0.1}, "temperature: expected at least 0, got -0.1"),
        ({"top_k": -1}, "top_k: expected at least 0, got -1"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected at least 0, got -1"),
    ],
)
def test_errors_name_the_argument(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompt": PROMPT, "max_new_tokens": 3} | arguments)


def test_a_compiled_model_generates_as_it_is_written(model):
    """Compiled, every token would be a recompilation, and the ninth an error."""
    compiled = Transformer(CONFIG)
    compiled.load_state_dict(model.state_dict())
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="eager")
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = compiled(tokens).logits
        assert generate(compiled, PROMPT, 20, temperature=0) == generate(model, PROMPT, 20, temperature=0)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(compiled(tokens).logits, expected)  # and what was compiled still is
