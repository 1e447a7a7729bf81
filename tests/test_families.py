"""What a model's own files may and may not decide, over the families that people bring: tiny models of each, random
weights, with the special tokens, ends and templates that the family has."""

import json
import shutil

import pandas as pd
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from training import make_trainer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SmolLM3Config,
)

from grpo_engage.base.core import child_seed, read_json, write_json
from grpo_engage.data import pairs as data
from grpo_engage.evaluation.generation import no_place
from grpo_engage.policy import model_files
from grpo_engage.policy.base_models import ensure_policy
from grpo_engage.policy.model_files import end_of_turn, reply_ids, stop_tokens
from grpo_engage.policy.replies import policy_stage, read_policy
from grpo_engage.policy.sampling import (
    INSTRUCTION,
    PromptTooLong,
    clean_text,
    format_prompt,
    generate_replies,
    load_adapted,
    load_policy,
    reply_nll,
)
from grpo_engage.train import arm_training
from grpo_engage.train.objective import Objective

POSTS = ["The trains are late again, 40 minutes!", "so happy for you 😀👩‍🚀", "Почему камера тормозит?",
         "この電車はまた遅れています。"]
REPLIES = ["same here, we waited an hour", "well done 👍🏽", "у меня тоже", "またですか"]
LONG = "この電車はまた遅れています。🚆 " * 60

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA = ("{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n"
         "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
         "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
         "{% endif %}")
GEMMA = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
         "{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
         "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
PHI = ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
       "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
           "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}")
SMOLLM3 = ("{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
           "<|im_start|>system\nToday: {{ strftime_now('%d %B %Y') }}{{ '' if enable_thinking else ' /no_think' }}\n"
           "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}<|im_end|>\n"
           "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
           "{% if add_generation_prompt %}<|im_start|>assistant\n"
           "{{ '' if enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}")
ALPACA = ("{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
          "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Reply:{% endif %}")
# (config class, template, special tokens, bos, eos, pad, the end of a turn, ends in generation_config, starts itself)
FAMILIES = {
    "llama": (LlamaConfig, LLAMA, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>",
                                   "<|end_header_id|>", "<|eom_id|>"],
              "<|begin_of_text|>", "<|end_of_text|>", None, "<|eot_id|>",
              ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], True),
    "qwen": (Qwen2Config, CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|endoftext|>",
             "<|im_end|>", ["<|im_end|>", "<|endoftext|>"], False),
    "gemma": (Gemma2Config, GEMMA, ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>",
              "<pad>", "<end_of_turn>", ["<eos>"], True),
    "phi": (Phi3Config, PHI, ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "<s>",
            "<|endoftext|>", "<|endoftext|>", "<|end|>", ["<|endoftext|>", "<|end|>"], False),
    "mistral": (MistralConfig, MISTRAL, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", None, "</s>",
                ["</s>"], True),
    "smollm3": (SmolLM3Config, SMOLLM3, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"], None,
                "<|im_end|>", "<|im_end|>", "<|im_end|>", ["<|im_end|>"], False),
    "gpt2": (GPT2Config, ALPACA, ["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>", None, "<|endoftext|>",
             ["<|endoftext|>"], False),
}
# What a generation_config.json or its like may ask for. None of it may change what is sampled.
OWN_SETTINGS = {
    "repetition_penalty": 1.3, "temperature": 0.1, "top_k": 2, "top_p": 0.2, "min_p": 0.5, "typical_p": 0.2,
    "no_repeat_ngram_size": 1, "suppress_tokens": list(range(20, 150)), "begin_suppress_tokens": list(range(20, 200)),
    "forced_bos_token_id": 200, "forced_eos_token_id": 201, "max_length": 3, "min_length": 300, "min_new_tokens": 8,
    "do_sample": False, "num_beams": 2, "num_return_sequences": 2, "stop_strings": ["e", "a"],
    "bad_words_ids": [[i] for i in range(20, 150)], "epsilon_cutoff": 0.02, "eta_cutoff": 0.02, "penalty_alpha": 0.6,
    "sequence_bias": [[[40], 9.0]], "exponential_decay_length_penalty": [1, 3.0], "max_time": 1e-6,
    "renormalize_logits": True, "guidance_scale": 3.0, "encoder_repetition_penalty": 2.0,
    "return_dict_in_generate": True, "output_scores": True, "use_cache": False,
}


def tokenizer_of(template, special, bos, eos, pad, starts):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([*POSTS, *REPLIES, INSTRUCTION], trainers.BpeTrainer(
        vocab_size=400, special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if starts:
        bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad,
                                        padding_side="right", model_max_length=20)  # the files' own, both of no use
    tokenizer.chat_template = template
    return tokenizer


def build(folder, name, context=256):
    """A model of family `name` in `folder`, as save_pretrained leaves it."""
    config_class, template, special, bos, eos, pad, _, ends, starts = FAMILIES[name]
    tokenizer = tokenizer_of(template, special, bos, eos, pad, starts)
    size = {"n_positions": context, "n_embd": 32, "n_layer": 1, "n_head": 2} if name == "gpt2" else {
        "max_position_embeddings": context, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "attention_dropout": 0.1}
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config_class(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.3, **size))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def changed(folder, target, name, **facts):
    """A copy of the model in `folder` whose file `name` also says `facts`."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    path = target / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | facts))
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("families")
    return {name: build(place / name, name) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request, folders):
    return request.param, folders[request.param]


# ---- the prompt

def test_a_prompt_is_the_templates_with_one_start_on_every_day(family, monkeypatch):
    name, folder = family
    tokenizer = load_policy(folder)[1]
    ids = tokenizer(format_prompt(POSTS[0], tokenizer))["input_ids"]
    chat = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": POSTS[0]}]
    if name == "gemma":
        chat = [{"role": "user", "content": f"{INSTRUCTION}\n\n{POSTS[0]}"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    if "strftime_now" in FAMILIES[name][1]:
        assert any(date in tokenizer.decode(ids) for date in ("26 Jul 2024", "26 July 2024"))
    else:
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id
    assert start is None or ids.count(start) == (name in ("llama", "gemma", "mistral"))
    if name == "smollm3":
        assert "/no_think" in tokenizer.decode(ids) and tokenizer.decode(ids).endswith("<think>\n\n</think>\n\n")


def test_without_a_template_it_is_refused(folders):
    tokenizer = load_policy(folders["gpt2"])[1]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        format_prompt("storm", tokenizer)
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id


@pytest.mark.parametrize("ending", ["$A {eos}", "{bos} $A {eos}"])
def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(folders, tmp_path, ending):
    folder = changed(folders["mistral"], tmp_path / "m", "tokenizer.json")
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(
        ending.format(bos="<s>", eos="</s>"), special_tokens=[(t, inner.token_to_id(t)) for t in ("<s>", "</s>")])
    inner.enable_truncation(12)  # baked in, as sentence-transformers do
    inner.enable_padding(length=64)
    inner.save(str(folder / "tokenizer.json"))
    plain, tokenizer = load_policy(folders["mistral"])[1], load_policy(folder)[1]
    assert [tokenizer(format_prompt(post, tokenizer))["input_ids"] for post in POSTS] == [
        plain(format_prompt(post, plain))["input_ids"] for post in POSTS]


# ---- the end of a reply

def test_a_reference_ends_with_the_token_that_stops_sampling(family, tmp_path):
    name, folder = family
    model, tokenizer = load_policy(folder)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name][6])
    assert end_of_turn(tokenizer) == end == reply_ids("fine", tokenizer)[-1]
    stops = stop_tokens(tokenizer, model.config, model.generation_config)
    assert model.generation_config.eos_token_id == stops
    assert {end, *tokenizer.convert_tokens_to_ids(FAMILIES[name][7]), tokenizer.eos_token_id} == set(stops)
    rows = trained_on(folder, tmp_path, Objective(1.0, 0.0, 0.0))._references([{
        "prompt": format_prompt(POSTS[0], tokenizer), "reference": REPLIES[0]}], 1)
    asked = tokenizer(format_prompt(POSTS[0], tokenizer))["input_ids"]
    assert rows["reference_ids"][0].tolist() == asked + reply_ids(REPLIES[0], tokenizer)
    assert rows["reference_labels"][0].tolist()[-1] == end
    chat = [{"role": "user", "content": POSTS[0]}, {"role": "assistant", "content": REPLIES[0]}]
    whole = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
    assert [*tokenizer(REPLIES[0], add_special_tokens=False)["input_ids"][1:], end] == (
        whole[: len(whole) - whole[::-1].index(end)][-len(reply_ids(REPLIES[0], tokenizer)) + 1:])


@pytest.mark.parametrize("name", ["gemma", "llama", "phi"])
def test_sampling_stops_at_each_end(folders, name):
    """The head is made to say one token only: whichever end it is, one token is all there is."""
    model, tokenizer = load_policy(folders[name])
    for end in model.generation_config.eos_token_id:
        def say_it(module, inputs, output, end=end):
            output.logits[..., end] = 1e4

        handle = model.register_forward_hook(say_it)
        made = generate_replies(model, tokenizer, POSTS[:2], max_new_tokens=5, label="")
        handle.remove()
        assert made["n_tokens"].eq(1).all() and made["finish_reason"].eq("stop").all() and made["text"].eq("").all()


def test_ends_come_from_the_config_too_but_no_word_is_one(folders, tmp_path):
    folder = changed(folders["llama"], tmp_path / "m", "config.json", eos_token_id=[1, 2, 300])  # 300: part of a word
    (folder / "generation_config.json").unlink()
    write_json(folder / "generation_config.json", {"eos_token_id": 5})
    model, tokenizer = load_policy(folder)
    assert model.generation_config.eos_token_id == [1, 2, 5]
    (folder / "generation_config.json").unlink()
    assert set(load_policy(folder)[0].generation_config.eos_token_id) >= {1, 2}


def test_no_end_at_all_is_refused(folders):
    tokenizer = load_policy(folders["gpt2"])[1]
    tokenizer.eos_token, tokenizer.chat_template = None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="no end token"):
        end_of_turn(tokenizer)


# ---- one distribution

def sampled(folder):
    made = generate_replies(*load_policy(folder), POSTS, n=2, max_new_tokens=10, seed=3, label="")
    return made[["text", "n_tokens", "finish_reason"]]


def trained_on(folder, place, objective=None):
    pairs = pd.DataFrame({"tweet": POSTS, "reply": REPLIES})
    return make_trainer(folder, pairs, place, objective=objective or Objective(0.0, 1.0, 0.0), posts_per_step=4,
                        num_generations=2, max_steps=1, max_new_tokens=10,
                        reward=lambda posts, replies: [float(len(reply)) for reply in replies])


def sampled_in_training(trainer):
    """What TRL's own generation gives for the prompts, batch and stream of `sampled`, in training mode."""
    rows = [row for row in trainer.train_dataset for _ in range(2)]
    order = {post: place for place, post in enumerate(POSTS)}
    rows.sort(key=lambda row: order[row["post"]])
    trainer.model.train()
    torch.manual_seed(child_seed(3, "generate", 0))
    ids = trainer._generate_single_turn(trainer._tokenize_prompts([row["prompt"] for row in rows])[0], None, {}, 2)[0]
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    return [clean_text(text, trainer.processing_class) for text in texts], [len(row) for row in ids]


def test_training_samples_what_the_evaluation_does(family, tmp_path):
    _, folder = family
    texts, lengths = sampled_in_training(trained_on(folder, tmp_path))
    expected = sampled(folder)
    assert texts == expected["text"].tolist() and lengths == expected["n_tokens"].tolist()
    assert len(set(texts)) > 3


@pytest.mark.parametrize("setting", OWN_SETTINGS)
def test_a_setting_of_the_files_changes_nothing(folders, tmp_path, setting):
    facts = {setting: OWN_SETTINGS[setting]} | ({"num_beams": 2} if setting == "num_return_sequences" else {})
    folder = changed(folders["qwen"], tmp_path / "m", "generation_config.json", **facts)
    pd.testing.assert_frame_equal(sampled(folder), sampled(folders["qwen"]))


def test_all_settings_together_change_neither_training_nor_an_adapted_model(folders, tmp_path):
    folder = changed(folders["phi"], tmp_path / "m", "generation_config.json", **OWN_SETTINGS)
    plain, own = (trained_on(place, tmp_path / place.name) for place in (folders["phi"], folder))
    assert sampled_in_training(own) == sampled_in_training(plain)
    own.model.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    one, two = (generate_replies(*load_adapted(place, tmp_path / "adapter"), POSTS, max_new_tokens=10, seed=3, label="")
                for place in (folders["phi"], folder))
    pd.testing.assert_frame_equal(one, two)


def test_nothing_but_token_ids_is_left_of_a_generation_config(family, tmp_path):
    """Whatever transformers may add to it: settings that are not in the table as well."""
    _, folder = family
    own = OWN_SETTINGS | {"top_h": 0.3, "cache_implementation": "static", "token_healing": True}
    model = load_policy(changed(folder, tmp_path / "m", "generation_config.json", **own))[0]
    assert set(model.generation_config.to_diff_dict()) <= {"bos_token_id", "eos_token_id", "pad_token_id",
                                                           "transformers_version"}


def test_the_soft_cap_of_an_architecture_stays(folders):
    assert load_policy(folders["gemma"])[0].config.final_logit_softcapping == 30.0


def test_vllm_is_told_where_to_stop(folders, tmp_path, monkeypatch):
    """Up to the trainer: the package itself needs a GPU."""
    class Caught(Exception):
        pass

    def catch(model, reward, arguments, *_, **__):
        raise Caught(arguments)

    monkeypatch.setattr(arm_training, "find_spec", lambda name: True)
    monkeypatch.setattr(arm_training, "ReplyTrainer", catch)
    with pytest.raises(Caught) as caught:
        make_trainer(folders["gemma"], pd.DataFrame({"tweet": POSTS}), tmp_path, objective=Objective(0.0, 1.0, 0.0),
                     reward=len, posts_per_step=4, num_generations=2, max_steps=1, generation_engine="vllm")
    ends = load_policy(folders["gemma"])[1].convert_ids_to_tokens(
        caught.value.args[0].generation_kwargs["stop_token_ids"])
    assert set(ends) == {"<eos>", "<end_of_turn>"}


# ---- padding

def test_padding_moves_no_likelihood(family, tmp_path):
    """A row alone, in a padded batch, and as TRL scores it, padded on the left and in training mode."""
    _, folder = family
    model, tokenizer = load_policy(folder)
    together = reply_nll(model, tokenizer, POSTS, REPLIES)
    alone = pd.concat([reply_nll(model, tokenizer, [p], [r]) for p, r in zip(POSTS, REPLIES, strict=True)])
    assert abs(together["nll"].to_numpy() - alone["nll"].to_numpy()).max() < 1e-3
    assert together["n_tokens"].tolist() == alone["n_tokens"].tolist()
    trainer = trained_on(folder, tmp_path)
    prompts = [tokenizer(format_prompt(post, tokenizer))["input_ids"] for post in POSTS]
    answers = [reply_ids(reply, tokenizer) for reply in REPLIES]
    left, right = (max(map(len, rows)) for rows in (prompts, answers))
    ids = torch.tensor([[tokenizer.pad_token_id] * (left - len(p)) + p + r + [tokenizer.pad_token_id] * (right - len(r))
                        for p, r in zip(prompts, answers, strict=True)])
    mask = torch.tensor([[0] * (left - len(p)) + [1] * len(p + r) + [0] * (right - len(r))
                         for p, r in zip(prompts, answers, strict=True)])
    with torch.no_grad():
        scores = trainer._get_per_token_logps_and_entropies(trainer.model.train(), ids, mask, right)[0]
    totals = [-float(row[: len(r)].sum()) for row, r in zip(scores, answers, strict=True)]
    assert max(abs(a - b) for a, b in zip(totals, together["nll"], strict=True)) < 2e-3


# ---- short contexts

@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("context, new", [(160, 28), (160, 60), (192, 10)])
def test_a_long_post_is_cut_at_its_end_and_the_template_stays(tmp_path, capsys, name, context, new):
    model, tokenizer = load_policy(build(tmp_path / name, name, context))
    prompt = format_prompt(LONG, tokenizer, "Reply.", new)
    size = len(tokenizer(prompt)["input_ids"])
    assert size <= context - max(new, context // 4) and size > context - max(new, context // 4) - 8
    before, after = format_prompt("§", tokenizer, "Reply.", new).split("§")
    assert prompt.startswith(before) and prompt.endswith(after)
    part = prompt[len(before): len(prompt) - len(after)]
    assert part and LONG.startswith(part) and "\ufffd" not in part
    made = generate_replies(model, tokenizer, [LONG, "storm", LONG], n=2, max_new_tokens=new, label="",
                            instruction="Reply.")
    assert len(made) == 6 and made.attrs["posts_cut"] == 2
    assert capsys.readouterr().out.count("posts are cut at their end") <= 1
    table = reply_nll(model, tokenizer, [LONG, "storm"], ["またですか " * 99, "ok"], instruction="Reply.")
    assert table["nll"].gt(0).all() and table["n_tokens"][0] <= context


def test_a_context_without_place_for_a_post_is_refused_in_one_line(tmp_path):
    model, tokenizer = load_policy(build(tmp_path / "short", "gpt2", 24))
    with pytest.raises(PromptTooLong) as error:
        generate_replies(model, tokenizer, ["storm"], max_new_tokens=20, label="")
    text = str(error.value)
    assert "\n" not in text and "short" in text and "24" in text and "20" in text
    assert no_place(tokenizer, "storm", "Reply.", "Reply at length, please. " * 20)


def test_training_on_long_posts_and_references_fits_a_short_context(tmp_path):
    folder = build(tmp_path / "short", "gpt2", 160)
    pairs = pd.DataFrame({"tweet": [post + LONG for post in POSTS], "reply": ["またですか " * 99, *REPLIES[1:]]})
    trainer = make_trainer(folder, pairs, tmp_path / "run", objective=Objective(1.0, 1.0, 0.0), posts_per_step=4,
                           num_generations=2, max_steps=1, max_new_tokens=60, micro_batch_size=8,
                           reward=lambda posts, replies: [float(len(reply)) for reply in replies])
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_post_is_limited_in_tokens_where_the_context_is_long(tmp_path):
    """Training on references refuses a prompt that leaves none of `max_length`; no post may come near."""
    tokenizer = load_policy(build(tmp_path / "long", "qwen", 32768))[1]
    prompt = format_prompt("🚆" * 1000, tokenizer)
    assert 300 < len(tokenizer(prompt)["input_ids"]) < 512 - 28 and prompt.endswith("assistant\n")
    accents = format_prompt("a" + "\u0301" * 999, tokenizer)  # one character, and no post may stop a run
    assert 300 < len(tokenizer(accents)["input_ids"]) < 512 - 28


def test_english_posts_of_nano_are_not_touched():
    tokenizer = load_policy(ensure_policy("nano"))[1]
    for post in ("a new bridge opens on monday at elm street.", "why is the camera app so slow? who will fix it? " * 5):
        assert format_prompt(post, tokenizer) == f"<|post|>{post.strip()}<|reply|>"


# ---- cut characters

@pytest.mark.parametrize("text", ["so happy for you 😀", "gut gemacht 👩‍🚀", "またですか", "у меня тоже", "👍🏽", "ok"])
def test_a_text_cut_anywhere_has_no_broken_character(text):
    tokenizer = load_policy(ensure_policy("nano"))[1]
    ids = tokenizer(text)["input_ids"]
    for kept in range(len(ids) + 1):
        cut = clean_text(tokenizer.decode(ids[:kept], skip_special_tokens=True), tokenizer)
        assert "\ufffd" not in cut and clean_text(text, tokenizer).startswith(cut) and clean_text(cut) == cut
        assert not cut.endswith("\u200d") or tokenizer.decode(ids[:kept]).endswith("\u200d")
    assert clean_text("a \ufffd b") == "a \ufffd b"  # what a text says in its middle is its own


def test_bytes_in_the_way_of_llama_2_leave_nothing_either():
    """Its decoder writes U+FFFD for each byte of a cut character, not one for all."""
    vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    bpe = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="</s>")
    ids = tokenizer("fun 😀")["input_ids"]
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd\ufffd\ufffd")
    assert [clean_text(tokenizer.decode(ids[:-cut]), tokenizer) for cut in (1, 2, 3, 4)] == ["fun"] * 4


# ---- what a run writes down

@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    data.data_stage(place / "run")
    shutil.copytree(folders["gemma"], place / "model")
    policy_stage(place / "run", policy=str(place / "model"), sample_posts=2, samples_per_post=2)
    return place


def test_the_policy_stage_writes_the_distribution_and_a_prompt(run):
    facts = read_json(run / "run" / "policy" / "policy.json")
    about = facts["sampling"]
    assert about["prompt"].count("<start_of_turn>") == 2 and INSTRUCTION in about["prompt"]
    assert about["reply_ends_with"] == "<end_of_turn>" and set(about["stop_tokens"]) == {"<eos>", "<end_of_turn>"}
    assert "temperature" in about["distribution"] and about["context"] == facts["context"] == 256
    assert read_json(run / "run" / "policy" / "manifest.json")["policy"] == facts
    assert read_policy(run / "run") == run / "model"


@pytest.mark.parametrize("name, facts, message", [
    ("generation_config.json", {"eos_token_id": [1, 3]}, "stop_tokens"),
    ("config.json", {"max_position_embeddings": 128}, "context"),
    ("tokenizer_config.json", {"bos_token": "<eos>"}, "prompt"),
])
def test_files_that_change_between_stages_are_noticed(run, tmp_path, monkeypatch, name, facts, message):
    other = changed(run / "model", tmp_path / "other", name, **facts)
    monkeypatch.setattr("grpo_engage.policy.replies.ensure_policy", lambda _: other)
    with pytest.raises(ValueError, match=f"files have changed since this run's stage policy: {message}"):
        read_policy(run / "run")


def test_a_changed_template_is_noticed_and_a_penalty_is_no_matter(run, tmp_path, monkeypatch):
    other = changed(run / "model", tmp_path / "other", "generation_config.json", repetition_penalty=1.3)
    monkeypatch.setattr("grpo_engage.policy.replies.ensure_policy", lambda _: other)
    assert read_policy(run / "run") == other
    (other / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(ValueError, match="files have changed"):
        read_policy(run / "run")


def test_dates_are_held_in_every_form_that_templates_use(folders):
    tokenizer = load_policy(folders["llama"])[1]
    tokenizer.chat_template = "\n  {{ strftime_now('%A %-d %d %B %b %m %Y %H:%M') }}"
    day = model_files.PROMPT_DATE
    assert model_files.render([{"role": "user", "content": "x"}], tokenizer).startswith(
        day.strftime("\n  %A ")) and day.strftime("%d %B %b %m %Y %H:%M") in model_files.render(
            [{"role": "user", "content": "x"}], tokenizer)
