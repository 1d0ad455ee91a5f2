"""Prompts to measure decoding with: the gain of a drafter depends on the text."""

from __future__ import annotations

_ARTICLE = (
    "The town council voted on Tuesday to close the old harbour bridge for repairs. The bridge, built in 1911, carries about four thousand "
    "cars a day. Engineers found rust in two of its seven spans last winter. The work will take nine months and cost three million. "
    "Until it is done, traffic goes by the northern road, which adds twenty minutes to the way to the hospital. "
    "A ferry for people on foot will run every quarter of an hour, free of charge. Shop owners by the harbour fear for their trade."
)
_LETTER = (
    "Dear Ms Alvarez, thank you for your order of 12 March. The walnut table has left our workshop and will be with you in the week of "
    "4 April. The six chairs are late: the mill that gives us the wood was closed by the flood, and we expect them in the middle of May. "
    "You may have the table now and the chairs later, or all together in May, at a discount of ten per cent. Please tell us by the end of "
    "the month what you prefer. We are sorry for the trouble. Yours, Peter Lindqvist"
)

SHAKESPEARE = (
    "ROMEO:\nBut soft, what light through yonder window breaks? It is the east,",
    "First Citizen:\nWe are accounted poor citizens, the patricians good.",
    "The king shall live. The king shall live. The king shall",
    "What say you to the matter of the people, and to the matter of the people",
)

KINDS: dict[str, tuple[str, ...]] = {
    "story": (
        "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
        "Tell me a story about a fox and a crow who share one winter.",
        "Write the beginning of a story that takes place on the last train of the night.",
        "Tell a story for children about a clock that is afraid of midnight.",
    ),
    "question": (
        "Why is the sky blue in the day and red in the evening?",
        "What is the difference between weather and climate?",
        "How does a refrigerator keep food cold?",
        "Who was Ada Lovelace, and why is she remembered?",
    ),
    "summary": (
        f"Summarise this text in three sentences, in its own words:\n\n{_ARTICLE}",
        f"Summarise this letter in three sentences, in its own words:\n\n{_LETTER}",
        f"Repeat this text without its first sentence:\n\n{_ARTICLE}",
        f"Rewrite this letter, with the name Chen in place of Alvarez:\n\n{_LETTER}",
    ),
    "code": (
        "Write a Python function that says whether a number is prime, with three examples of its use.",
        "Write a Python class for a stack with push, pop and peek.",
        "Add type hints to this code:\n\ndef total(prices, tax):\n    result = 0\n    for price in prices:\n"
        "        result = result + price * (1 + tax)\n    return result",
        "Write an SQL query that counts the orders of every customer, and explain it.",
    ),
}
