"""The tokenizer of an export as its tokenizer.json says. Shipped where transformers would load it by a class of the family.

That class takes the vocabulary alone and splits and normalises texts as the family's own tokenizer does.
"""

import transformers


class PreTrainedTokenizerFast(transformers.PreTrainedTokenizerFast):
    """The stock class, by a name that ``auto_map`` can give."""
