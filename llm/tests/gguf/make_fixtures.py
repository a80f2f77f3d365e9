"""Writes what the tests of GGUF files compare with: a model in several files, tokenizers of small vocabularies, and what
`sentencepiece`, `transformers` and `tokenizers` make of texts with them.

    python -m venv venv
    venv/bin/pip install torch==2.15.0 transformers==5.24.0 tokenizers==0.23.3 sentencepiece==0.2.3 gguf==0.19.0
    venv/bin/python llm/tests/gguf/make_fixtures.py
"""

import io
import json
import random
from pathlib import Path

import gguf
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.integrations.gguf import gguf_tokenizer_mapping as transformers_gguf

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
LETTERS = {
    "latin": (list("bcdfglmnprst"), list("aeiou"), ["", "n", "r", "té", "ü", "ço", "ß", "łą"]),
    "cyrillic": (list("бвгдклмнпрст"), list("аеиоуыя"), ["", "й", "на", "ть"]),
    "greek": (list("βγδκλμνπρσ"), list("αειουώά"), ["", "ς", "ν"]),
    "arabic": (list("ابتجحدرسع"), list("فقكلمنهوي"), ["", "ات", "ة"]),
    "hebrew": (list("אבגדהוזחט"), list("יכלמנסעפצ"), ["", "ים", "ת"]),
    "devanagari": (list("कखगचजतदनप"), ["ा", "ि", "ी", "ु", "े", ""], ["न", "र्म", "ल"]),
    "han": (list("的一是不了人我在有他"), list("这中大来上国个到说们"), ["", "时", "出。"]),
    "kana": (list("あいうえおかきくけこ"), list("さしすせそたちつてと"), ["", "の", "カード"]),
    "hangul": (list("가나다라마바사아자차"), list("카타파하은는이를"), ["", "고"]),
}
CODE = [
    "def f(x):\n    return x + 1\n", "if (a == b) {\n\t\treturn;\n}", "x = [i for i in range(10)]", "<p class=\"a\">it's</p>",
    "fn main() {}", "a->b::c", "\\frac{1}{2}", "HelloWorld getHTTPResponse", "I'LL you're We'Ve", "http://a.b/c?d=1&e=%20", "1,234.5",
]
ODD = [
    "😀", "👍🏽", "🇫🇷", "👨‍👩‍👧", "\u200b", "\u00a0", "\u3000", "\ufeff", "\u202e", "e\u0301", "ﬁ", "①", "½", "Ⅷ", "𝔘", "\U0010fffe", "\x00",
    "\x01", "\x7f", "\ufffd", "▁", "▁▁", "\u2028", "\u0085", "<0x0A>", "<0xE2>", "ǅ", "ʰ", "İ", "ſ", "٣٤", "߁",
]
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\t", "", " " * 9, " " * 40, "\r\n", "\n \n"]


def some_word(choose):
    first, second, end = LETTERS[choose.choice(list(LETTERS))]
    word = "".join(choose.choice(first) + choose.choice(second) for _ in range(choose.randint(1, 2))) + choose.choice(end)
    return choose.choices([word, word.capitalize(), word.upper()], [8, 2, 1])[0]


def some_text(choose, odd):
    parts = []
    for _ in range(choose.choice([1, 1, 2, 2, 3, 4])):
        kind = choose.random()
        if kind < 0.6:
            parts.append(some_word(choose))
        elif kind < 0.7:
            parts.append(str(choose.randint(0, 10 ** choose.randint(1, 8))))
        elif kind < 0.76:
            parts.append(choose.choice(CODE))
        elif kind < 0.84:
            parts.append(choose.choice("!?.,;:()[]{}'\"-–—…«»/\\@#$%^&*_+=~`|<>") * choose.choice([1, 1, 2, 3, 5]))
        elif odd and kind < 0.95:
            parts.append(choose.choice(ODD))
        else:
            parts.append(choose.choice("abxz=-# .\n\t") * choose.randint(2, 20))
        parts.append(choose.choices(SPACES, [60, 8, 3, 6, 3, 2, 12, 2, 1, 1, 1])[0])
    text = "".join(parts)
    return text.strip() if choose.random() < 0.6 else text


def write(name, content):
    path = FIXTURES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{name}: {path.stat().st_size:,} bytes")


def short(ids):
    """Two digits of base 36 for each."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    assert all(0 <= it < 36 * 36 for it in ids)
    return "".join(digits[it // 36] + digits[it % 36] for it in ids)


def split():
    """The model of the other fixtures in three files."""
    source = gguf.GGUFReader(HERE.parent / "llama/fixtures/qwen3.gguf")
    path = FIXTURES / "split/qwen3.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "qwen3", split_max_tensors=10)
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


TURNS = ["<mask>", "<start_of_turn>", "<end_of_turn>"]
RUNS = [it * count for it in "\n▁" for count in range(2, 9)]
SETTINGS = {
    "llama": {"vocab_size": 900, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "add_dummy_prefix": True},
    # Two spaces in a row are one, and texts have none at their ends.
    "single": {
        "vocab_size": 600, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "add_dummy_prefix": True,
        "remove_extra_whitespaces": True,
    },
    # Gemma's ways: no space before a text, and runs of line breaks and spaces that are tokens.
    "gemma": {
        "vocab_size": 900, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "bos_piece": "<bos>", "eos_piece": "<eos>",
        "add_dummy_prefix": False, "user_defined_symbols": [*TURNS, *RUNS, "<h1>", "</h1>"],
    },
}


def trained(settings, texts):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", allow_whitespace_only_pieces=True, character_coverage=0.998, num_threads=1,
        minloglevel=2, **{"remove_extra_whitespaces": False, **settings},
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def kind_of(model, number, settings):
    if model.id_to_piece(number) in settings.get("user_defined_symbols", []):
        # llama.cpp's converter has those of turns as control tokens.
        return 3 if model.id_to_piece(number) in TURNS else 4
    kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6)]
    return next((kind for asks, kind in kinds if asks(number)), 1)


def with_specials(choose, texts, specials):
    """Texts with special tokens at their beginnings and ends, and between."""
    for text, other in zip(texts[::2], texts[1::2]):
        first, second = choose.choice(specials), choose.choice(specials)
        yield choose.choice([first + text + second + other, text + first + other, first + second + " " + text, text + " " + first + "\n" + other])


def sentencepieces(all_texts):
    training = random.Random(1)
    corpus = [some_text(training, False).replace("\n", " ") for _ in range(4000)]
    for name, settings in SETTINGS.items():
        model = trained(settings, corpus)
        numbers = range(model.get_piece_size())
        pieces = [model.id_to_piece(it) for it in numbers]
        kinds = [kind_of(model, it, settings) for it in numbers]
        # As llama.cpp's converter spells them.
        pieces = [piece.replace("▁", " ") if kind == 4 else piece for piece, kind in zip(pieces, kinds)]
        scores = [model.get_score(it) for it in numbers]
        field = {
            "model": "llama", "tokens": pieces, "scores": scores, "token_type": kinds, "bos_token_id": model.bos_id(),
            "eos_token_id": model.eos_id(), "unknown_token_id": model.unk_id(), "add_space_prefix": settings["add_dummy_prefix"],
        }
        fields = {f"tokenizer.ggml.{key}": value for key, value in field.items()}
        is_single = settings.get("remove_extra_whitespaces", False)
        texts = all_texts[:200] if is_single else all_texts
        if is_single:
            fields["tokenizer.ggml.remove_extra_whitespaces"] = True
        ids = [model.encode(text) for text in texts]
        decoded = {index: model.decode(ids[index]) for index in range(len(texts)) if model.decode(ids[index]) != texts[index]}
        content = {"fields": fields, "ids": [short(it) for it in ids], "decoded": decoded, "special": []}
        if not is_single:
            # What transformers makes of such a file.
            described = {"tokenizer_type": "llama", **{key: field[key] for key in ["tokens", "scores", "token_type"]}}
            builder = {"llama": transformers_gguf.phi3_tokenizer, "gemma": transformers_gguf.gemma_tokenizer}[name]
            judge = transformers_gguf.add_gguf_special_tokens(builder(described), described).backend_tokenizer
            # All but those of Gemma with more spaces in a row than a token has.
            same = [text for text, it in zip(texts, ids) if judge.encode(text, add_special_tokens=False).ids == it]
            print(f"{name}: transformers has the same tokens for {len(same)} of {len(texts)} texts")
            specials = [piece for piece, kind in zip(pieces, kinds) if kind in (2, 3)]
            plain = [text for text in same if "▁" not in text][:160]
            for text in with_specials(random.Random(3), plain, specials):
                encoded = judge.encode(text, add_special_tokens=False).ids
                content["special"].append([text, short(encoded), judge.decode(encoded, skip_special_tokens=True)])
        write(f"{name}.json", content)


# How texts are divided, as in the tokenizer.json of models whose files have these names.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = [
    r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]


def divided(*patterns):
    steps = [pre_tokenizers.Split(Regex(it), behavior="isolated") for it in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIVISIONS = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "falcon": pre_tokenizers.Sequence([
        pre_tokenizers.Punctuation(behavior="contiguous"), BYTES, pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
    ]),
    # llama.cpp's way of files that name none, by its expressions.
    "default": pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[\p{P}\$\+<=>\^~\|]+"), behavior="isolated"), BYTES,
        pre_tokenizers.Split(Regex(r"\p{N}+"), behavior="isolated"), pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
    ]),
    # Python's tokenizers of Llama 3 and of OLMo 2 say the same in two ways.
    "llama-bpe": divided(LLAMA3),
    "dbrx": pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]),
    "qwen2": divided(transformers_gguf._QWEN2_SPLIT),
    "qwen35": divided(transformers_gguf._QWEN35_SPLIT),
    "tekken": divided(transformers_gguf._TEKKEN_SPLIT),
    "gpt-4o": divided(transformers_gguf._GPT4O_SPLIT),
    "deepseek-v3": divided(*DEEPSEEK),
}


def divisions(texts):
    """Byte pairs that were learned from undivided texts, so that each division has other tokens."""
    training = random.Random(2)
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    corpus = [some_text(training, True) for _ in range(4000)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, max_token_length=6, show_progress=False)
    learned.train_from_iterator(corpus, trainer)
    model = json.loads(learned.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    ids = {}
    for name, division in DIVISIONS.items():
        merging = models.BPE(
            vocab=model["vocab"], merges=[tuple(it) for it in model["merges"]], ignore_merges=name in ("llama-bpe", "tekken"),
        )
        judge = Tokenizer(merging)
        judge.pre_tokenizer, judge.decoder = division, decoders.ByteLevel()
        encoded = [judge.encode(text).ids for text in texts]
        assert all(judge.decode(it, skip_special_tokens=False) == text for it, text in zip(encoded, texts))
        ids[name] = [short(it) for it in encoded]
    different = len({json.dumps(it) for it in ids.values()})
    print(f"{len(ids)} divisions of texts, {different} of them different")
    write("divisions.json", {"tokens": tokens, "merges": [" ".join(it) for it in model["merges"]], "texts": texts, "ids": ids})


def main():
    choose = random.Random(0)
    texts = [some_text(choose, True) for _ in range(1000)]
    write("texts.json", texts)
    split()
    sentencepieces(texts)
    divisions([some_text(choose, True) for _ in range(70)] + CODE)


if __name__ == "__main__":
    main()
