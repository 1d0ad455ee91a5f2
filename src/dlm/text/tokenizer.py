"""Text to tokens and back: characters, bytes, or any Hugging Face `tokenizer.json`, behind one class.

The mask is one more id after the vocabulary, without a text, or a control token; no prompt can spell either.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dlm.errors import InputError
from dlm.files import parse_json
from dlm.spelling import Part, Spelling
from dlm.text import growth
from dlm.text.parts import Parts, Place, alphabet_of, placed

FAILS = "the tokenizer of this model fails on this text"
HOLE = re.compile(r"\\_|_|[^_\\]+|\\")


def read(path: str | Path) -> tokenizers.Tokenizer:
    """A `tokenizer.json`, or the one in a directory. InputError where it is missing or damaged."""
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path} does not exist; a tokenizer is 'chars', 'bytes', 'bpe:SIZE' or the path of a tokenizer.json")
    try:
        text = path.read_text(encoding="utf-8")
        data = parse_json(text, "it")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a tokenizer.json ({error})") from None
    growth.check(data, path)  # added tokens are normalized when they are read
    with telling(f"{path} is not a tokenizer.json"):
        return tokenizers.Tokenizer.from_str(text)


@contextmanager
def telling(what: str) -> Iterator[None]:
    """InputError, with the first line of the reason, for an error of the Rust side: a bare Exception, or a panic, which is none."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, InputError) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise InputError(f"{what} ({(str(error) or type(error).__name__).splitlines()[0]})") from None


def numbers(count: int) -> tokenizers.Tokenizer:
    """Ids spelled as numbers with spaces between them, for a checkpoint without tokenizer: `17 3 99`."""
    inner = tokenizers.Tokenizer(models.WordLevel({str(i): i for i in range(count)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Replace(Regex("$"), " ")
    return inner


def ascii_codes(count: int) -> tokenizers.Tokenizer:
    """A token for each character, its code."""
    inner = tokenizers.Tokenizer(models.WordLevel({chr(i): i for i in range(count)}))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return inner


class Tokenizer:
    """A `tokenizers.Tokenizer` that never reads special tokens out of ordinary text.

    vocab_size: ids of the network without a mask after them; some networks have more of them than the tokenizer has tokens.
    mask_id: of a mask among the tokens; by default it is one more id after them.
    classes: how the class tokens of a network are shown, whose ids follow the mask. No text holds one.
    """

    def __init__(self, inner: tokenizers.Tokenizer, vocab_size: int = 0, mask_id: int | None = None, classes: Sequence[str] = ()) -> None:
        self.inner = inner
        self.inner.encode_special_tokens = True  # "<|endoftext|>" in a prompt is text
        self.inner.no_padding()
        self.inner.no_truncation()
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size: int = vocab_size or max(vocabulary.values()) + 1
        if max(vocabulary.values()) >= self.vocab_size:
            raise InputError(
                f"the tokenizer has {max(vocabulary.values()) + 1} tokens, the network {self.vocab_size}: they do not belong together"
            )
        self.mask_id: int = self.vocab_size if mask_id is None else mask_id
        first_class = max(self.vocab_size, self.mask_id + 1)
        self.ids: int = first_class + len(classes)
        self.control = {token.content: i for i, token in inner.get_added_tokens_decoder().items() if token.special}
        whole = isinstance(inner.model, models.WordLevel) and inner.model.unk_token not in inner.get_vocab()
        self._numbers = whole and "WhitespaceSplit" in str(inner.pre_tokenizer)
        self._closed = whole and not self._numbers
        single_bytes = set(inner.get_vocab()) == set(pre_tokenizers.ByteLevel.alphabet())
        # a byte-level vocabulary learned from a text knows only the bytes in it, and silently drops others
        partial = isinstance(inner.model, models.BPE) and inner.model.unk_token is None and not inner.model.byte_fallback
        self._known = set(inner.get_vocab())
        lacks_bytes = partial and not self._known >= set(pre_tokenizers.ByteLevel.alphabet())
        self._bytes = "ByteLevel" in str(inner.pre_tokenizer) and lacks_bytes
        self._separable = self._closed or single_bytes  # every token one character or byte: text may be cut anywhere
        parts = Parts(inner)
        parts.update({first_class + number: Part(name.encode()) for number, name in enumerate(classes)})
        self.spelling, self._falls_back = Spelling(parts, self.mask_id), parts.fallback
        self._placed: dict[Place, tokenizers.Tokenizer] = {"start": inner}

    @classmethod
    def characters(cls, text: str) -> Tokenizer:
        """One token for each distinct character of `text`, in code point order."""
        if not text:
            raise InputError("no text to take characters from: give a file that is not empty")
        inner = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(sorted(set(text)))}))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        inner.decoder = decoders.Fuse()
        return cls(inner)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """256 tokens, one for each byte of UTF-8."""
        inner = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        return cls(inner)

    @classmethod
    def bpe(cls, text: str, size: int, rest: str = "") -> Tokenizer:
        """Byte-pair encoding with `size` tokens learned from `text` (GPT-2's word boundaries). Its alphabet: the bytes of text and rest."""
        found = {*text.encode(), *rest.encode()}
        if size <= len(found):
            raise InputError(f"bpe:{size} leaves no room for a merge: this text has {len(found)} different bytes")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        letters = sorted({c for char in set(text + rest) for c in alphabet.pre_tokenize_str(char)[0][0]})
        trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=letters)
        inner.train_from_iterator(text.splitlines(keepends=True), trainer)
        if inner.get_vocab_size() < size:
            raise InputError(f"this text has only {inner.get_vocab_size()} different tokens: bpe:{size} needs more text")
        return cls(inner)

    @classmethod
    def load(cls, path: str | Path, vocab_size: int = 0) -> Tokenizer:
        """Read a `tokenizer.json`, or the one in a directory."""
        return cls(read(path), vocab_size)

    @classmethod
    def with_mask(cls, inner: tokenizers.Tokenizer, ids: int, mask_id: int) -> Tokenizer:
        """For a network of so many ids, whose mask is a token of `inner` or one id more."""
        return cls(inner, ids, mask_id) if inner.id_to_token(mask_id) is not None else cls(inner, mask_id)

    @classmethod
    def make(cls, kind: str, text: str, rest: str = "") -> Tokenizer:
        """`chars`, `bytes`, `bpe:1024` (learned from this text), or a path. rest: text to encode as well, which nothing is learned from."""
        name, _, size = kind.partition(":")
        if name == "bpe" and size.isdigit():
            return cls.bpe(text, int(size), rest)
        return cls.characters(text + rest) if kind == "chars" else cls.bytes() if kind == "bytes" else cls.load(kind)

    def with_classes(self, names: Sequence[str]) -> Tokenizer:
        """The same for a network that also reads class tokens, shown by these names."""
        return Tokenizer(self.inner, self.vocab_size, self.mask_id, names) if names else self

    def save(self, path: str | Path) -> None:
        self.inner.save(str(path))

    def encode(self, text: str, place: Place = "start") -> list[int]:
        """Token ids of a text; place: where it stands, which decides whether the tokenizer puts a space before it.

        InputError names the characters that a closed vocabulary lacks, and for text that is not Unicode.
        """
        inner = self._at(place)
        self._check(text)
        with telling(FAILS):
            encoding = inner.encode(text, add_special_tokens=False)
        read = {i for begin, end in encoding.offsets for i in range(begin, end)}
        if any(i not in read and not c.isspace() for i, c in enumerate(text)) and (lost := self._lost(text)):
            raise InputError(f"this model has no token for {', '.join(f'{c!r} (U+{ord(c):04X})' for c in lost[:5])}")
        ids: list[int] = encoding.ids
        if self.mask_id in ids:  # of a tokenizer that does not mark it as a control token
            spelt = self.inner.decode([self.mask_id], skip_special_tokens=False)
            raise InputError(f"the text spells the mask {spelt!r}, which stands for tokens to generate: write it otherwise")
        return ids

    def _at(self, place: Place) -> tokenizers.Tokenizer:
        if place not in self._placed:
            self._placed[place] = placed(self.inner, place)
        return self._placed[place]

    def _normal(self, text: str) -> str:
        normal: str = text if self.inner.normalizer is None else self.inner.normalizer.normalize_str(text)
        return normal

    def _lost(self, text: str) -> list[str]:
        """Characters that a vocabulary without unknown token and byte fallback drops. Offsets do not tell: those of text that
        a normalizer composed or removed do not cover it."""
        normal, splits = self._normal(text), self.inner.pre_tokenizer
        lost = set()
        for word, _ in splits.pre_tokenize_str(normal) if splits is not None else [(normal, (0, 0))]:
            read = {i for token in self.inner.model.tokenize(word) for i in range(*token.offsets)}
            begin = 0
            for char in word:  # the model counts bytes
                size = len(char.encode())
                if not read & set(range(begin, begin + size)):
                    lost.add(char)
                begin += size
        return sorted(lost)

    def encode_template(self, template: str) -> list[int | None]:
        """Token ids of a text in which every `_` is one hole, None, and `\\_` an underscore. InputError where there is none."""
        row: list[int | None] = []
        text = ""
        for part in HOLE.findall(template):
            if part == "_":
                row += [*self.encode(text, "inside" if row else "start"), None]
                text = ""
            else:
                text += "_" if part == "\\_" else part
        row += self.encode(text, "inside")
        if None not in row:
            raise InputError("the template has no hole: write _ for every token to fill")
        return row

    def encode_corpus(self, documents: Iterable[str]) -> np.ndarray:
        """All documents in one int32 stream, encoded a few lines at a time so that a long file needs little memory.

        It decodes to the documents joined: none but the first gets a space that it has not.
        """
        parts: list[np.ndarray] = []
        for number, document in enumerate(documents):
            self._check(document)
            size = 65536 if self._separable else len(document) or 1
            chunks = [document[i : i + size] for i in range(0, len(document), size)]
            inner = self._at("inside" if number else "start")
            with telling(FAILS):
                encodings = inner.encode_batch_fast(chunks, add_special_tokens=False)
            parts += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; masks have none.

        Bytes of SentencePiece's byte fallback are characters wherever they are whole, as in SentencePiece itself; the tokenizers library
        gives up a whole run of them for one that is not.
        """
        given = [i for i in ids if i != self.mask_id]
        text: str = self.spelling.text(given) if self._falls_back else self.inner.decode(given, skip_special_tokens=False)
        return text

    def piece(self, token: int) -> str:
        """The text of one token inside a text; an incomplete character is U+FFFD, the mask has none."""
        return self.spelling.alone(token, mask="")

    def pieces(self) -> dict[int, str]:
        """The text of every token by itself; the mask has none."""
        return {token: self.piece(token) for token in range(self.vocab_size) if token != self.mask_id}

    def fingerprint(self) -> str:
        """Equal for equal tokenizers."""
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()[:16]

    def _check(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid UTF-8 at character {error.start + 1}: give it in UTF-8") from None
        if self._numbers and (strange := [word for word in text.split() if word not in self._known]):
            raise InputError(f"this model has no tokenizer, so its text is token ids such as 17 3 99, and {strange[0]!r} is none of them")
        if not self._closed and not self._bytes:
            return
        if self._bytes:
            lacking = [c for c in sorted(set(self._normal(text))) if not alphabet_of(c) <= self._known]
        else:
            lacking = sorted(set(text) - self._known)
        if not lacking:
            return
        shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in lacking[:5]) + (" ..." if len(lacking) > 5 else "")
        if self._bytes:
            raise InputError(f"this model has no token for {shown}: its vocabulary was learned from a text without them")
        known = "".join(c for c in sorted(self._known) if c.isprintable())
        newline = "newline and " if "\n" in self._known else ""
        raise InputError(f"this model has no token for {shown}; it knows: {newline}{known}")
