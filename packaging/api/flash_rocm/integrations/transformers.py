class Packing(tuple):
    def __init__(self, rows_q, rows_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window=0): ...
    rows_q: object
    rows_k: object
    cu_seqlens_q: object
    cu_seqlens_k: object
    max_seqlen_q: object
    max_seqlen_k: object
    window: object

class Window(tuple):
    def __init__(self, window): ...
    window: object

def register(name='rocm_attention'): ...

def packing_of(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, config=None, use_vmap=False, **unused): ...

def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None, is_causal=None, sliding_window=None, s_aux=None, **kwargs): ...
