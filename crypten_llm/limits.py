"""How large things may be that a file or another party names: the sizes of a model, of a request, of a message.

Owns these caps, which are beyond every model that is known and far below what would exhaust a machine by being counted.
What passes them is held against this machine's memory (``memory``) before anything of that size is made.
"""

LAYERS = 1 << 10  # the largest published dense models have 126
HIDDEN = 1 << 17  # 16,384
FFN = 1 << 20  # 53,248
HEADS = 1 << 12  # 128
HEAD_DIM = 1 << 12  # 256
VOCABULARY = 1 << 22  # 262,144
PARAMETERS = 1 << 42  # 4 * 10^11
CONTEXT = 1 << 27  # 10^7

TOKENS = 1 << 24  # of a prompt, of an answer, of a pass over a prompt
PADDED = 1 << 14  # rows that a cache is counted as a multiple of
PROMPTS = 1 << 10  # that share their rounds
OFFERED = 16  # blocks of a stock, one of which a request takes
BLOCKS = 1 << 14  # of a party's stock
CONVERSATIONS = 1 << 8  # whose caches are kept in one session
COUNT = 1 << 62  # of bytes, rounds and all else that is only shown

MESSAGE_BYTES = 16 << 20  # of one between parties
SETTINGS_BYTES = 16 << 20  # of a file of settings: config.json and its like, a chat template
TEXT = 64 << 20  # characters of a text that a person gives
GRAMMAR = 1 << 18  # characters of the schemas and tools that an answer has to follow
POLICY_BYTES = 1 << 30  # of a policy's trained weights
TOKENIZER_BYTES = 512 << 20  # of tokenizer.json or an index of weights
