"""bitkv inside Hugging Face Transformers (5.16 and later), without patching a model.

`PackedLayer.update` keeps the new keys and values back and returns light handles; the attention function
registered as "bitkv" recognises them, now knows the mask and so the padding, stores the real tokens and
attends to the packed cache. A handle that any other operation touches becomes the whole cache in the
model's dtype: slow but right. Layers that are not full attention keep the cache Transformers gives them.
"""

from bitkv.integrations.transformers.cache import PackedCache
from bitkv.integrations.transformers.context import packed
from bitkv.integrations.transformers.fingerprint import fingerprint
from bitkv.integrations.transformers.layer import Handle, PackedLayer
from bitkv.integrations.transformers.static import StaticPackedLayer

__all__ = ["Handle", "PackedCache", "PackedLayer", "StaticPackedLayer", "fingerprint", "packed"]
