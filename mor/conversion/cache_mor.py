"""Keys, values and attention of `modeling_mor.py`, in two executions with the same results.

  gathered   tokens that a step keeps are gathered, and only they are run
  masked     every token is run, and results of the others are dropped; no shape and no
             branch depends on data, as torch.compile and torch.export ask

A slot holds keys and values of one unrolled layer, with a place for every token of
every batch row, and a mark where the layer has written. Reading never sees a place
without its mark, so cutting columns off a cache restores what it was.

Axes: B batch rows, T columns of the input, S columns with the past, M tokens of a pass
(flat), b batch rows of a pass, C queries of a batch row, N query heads, K key heads,
H head width.

Source: arXiv 2507.10524 (MoR); transformers cache_utils.
"""

import torch
import torch.nn.functional as F
from transformers import Cache

BLOCK = 64  # columns by which a slot grows


class _Slot:
  """Keys (rotated) and values [B, S, K, H] of one unrolled layer, and marks of what was written [B, S]."""

  tensors = None

  def grow(self, k_MKH, v_MKH, batch, num_columns, block):
    """Returns the tensors with at least `num_columns` columns, longer by whole blocks where they were shorter."""
    old = self.tensors
    if old is None:
      old = [k_MKH.new_zeros(batch, 0, *k_MKH.shape[1:]), v_MKH.new_zeros(batch, 0, *v_MKH.shape[1:]),
             torch.zeros(batch, 0, dtype=torch.bool, device=k_MKH.device)]
    missing = num_columns - old[0].shape[1]
    if missing > 0:
      room = -(-missing // block) * block
      old = [torch.cat([x, x.new_zeros(batch, room, *x.shape[2:])], 1) for x in old]
    return old


class MorCache(Cache):
  """Keys and values of the unrolled layers, one slot each.

  Routing saves compute, not this memory. Shared plans take the memory of the unique layers.
  """

  is_compileable = False  # as a static cache is

  def __init__(self, config):
    super().__init__(layers=[])
    self.slots = [_Slot() for _ in range(config.num_hidden_layers)]
    self.valid_BS = None  # False in padded columns

  def __len__(self):
    return len(self.slots)

  def get_seq_length(self, layer_idx=0):
    """Returns the number of columns."""
    return 0 if self.valid_BS is None else self.valid_BS.shape[1]

  def crop(self, max_length):
    """Keeps the first columns: `max_length` of them, or all but the last `-max_length` if it is not positive."""
    length = max_length if max_length > 0 else max(self.get_seq_length() + max_length, 0)
    if length < self.get_seq_length():
      self._change(lambda x: x[:, :length])

  def reset(self):
    """Forgets everything."""
    self.valid_BS = None
    for slot in self.slots:
      slot.tensors = None

  def reorder_cache(self, beam_idx):
    """Takes batch row `beam_idx[i]` as batch row i."""
    self._change(lambda x: x[beam_idx.to(x.device)])

  def batch_select_indices(self, indices):
    """Keeps some batch rows."""
    self._change(lambda x: x[indices])

  def batch_repeat_interleave(self, repeats):
    """Repeats each batch row."""
    self._change(lambda x: x.repeat_interleave(repeats, 0))

  def activate_past_recording(self):
    """Keeps every column until `crop`, as always."""

  def update(self, *unused, **options):
    """Refuses keys of another model."""
    raise ValueError("a MorCache holds keys of a MorModel only; give another model its own cache")

  def _change(self, change):
    self.valid_BS = None if self.valid_BS is None else change(self.valid_BS)
    for slot in self.slots:
      slot.tensors = None if slot.tensors is None else [change(x) for x in slot.tensors]


class _View:
  """A pass over the tokens of `run_BT`, flat: their places, and the columns that they may see.

  Softmax over no key is NaN, so a query whose result is dropped sees more than it should:
  a subclass marks it in `mask_bCS`, or in `idle_bC1` if it must see every column.
  """

  idle_bC1 = None

  def attend(self, q_MNH, own, base):
    """Returns attention over the keys of `own`, of `base`, or of `base` overlaid by `own`."""
    k_bSKH, v_bSKH, written_bS = self.read(base if own is None else own)
    if own is not None and base is not None:
      under, pick = self.read(base), written_bS[:, :, None, None]
      k_bSKH, v_bSKH = torch.where(pick, k_bSKH, under[0]), torch.where(pick, v_bSKH, under[1])
      written_bS = written_bS | under[2]
    q_bCNH = self.spread(q_MNH)
    num_queries, num_kv = q_bCNH.shape[1], k_bSKH.shape[2]
    group = q_MNH.shape[1] // num_kv  # query heads of one key head become further queries, so no key is copied
    q_bKXH = q_bCNH.unflatten(2, (num_kv, group)).transpose(1, 2).flatten(2, 3)
    mask_bCS = self.mask_bCS & written_bS[:, None]
    mask_bCS = mask_bCS if self.idle_bC1 is None else mask_bCS | self.idle_bC1
    out_bKXH = F.scaled_dot_product_attention(
        q_bKXH, k_bSKH.transpose(1, 2), v_bSKH.transpose(1, 2),
        attn_mask=mask_bCS.repeat_interleave(group, 1)[:, None])
    return self.collect(out_bKXH.unflatten(2, (num_queries, group)).transpose(1, 2).flatten(2, 3))


class GatheredView(_View):
  """Runs the tokens of `run_BT` alone; at least one of them is True.

  Attention lays queries out [b, C]: b batch rows with a token, C tokens of the fullest
  batch row. An empty place sees its whole batch row.
  """

  def __init__(self, run_BT, start, valid_BS, rotation_BTH):
    self.at = self.row_M, index_M = run_BT.nonzero(as_tuple=True)
    self.start, (self.batch, self.num_columns) = start, valid_BS.shape
    self.column_M = index_M + start
    self.rotation_M1H = [self.take(x)[:, None] for x in rotation_BTH]
    any_B = run_BT.any(1)
    self.rows = None if any_B.all() else any_B.nonzero()[:, 0]
    self.size = int(any_B.sum()), int(run_BT.sum(1).max())
    self.place = (any_B.cumsum(0) - 1)[self.row_M], (run_BT.cumsum(1) - 1)[self.at]
    last_bC = self.column_M.new_full(self.size, self.num_columns - 1).index_put(self.place, self.column_M)
    past_bCS = torch.arange(self.num_columns, device=run_BT.device) <= last_bC[..., None]
    self.mask_bCS = past_bCS & (valid_BS if self.rows is None else valid_BS[self.rows])[:, None]

  def take(self, x_BT):
    """Returns the tokens that run."""
    return x_BT[self.at]

  def put(self, x_BT, new_M):
    """Returns `x_BT` with new values of the tokens that run."""
    return x_BT.index_put(self.at, new_M)

  def write(self, slot, k_MKH, v_MKH):
    """Writes keys and values of the tokens that run."""
    if self.start == 0:
      slot.tensors = None  # a layer that is run again for its gradient starts anew
    tensors = slot.grow(k_MKH, v_MKH, self.batch, self.num_columns, BLOCK)
    write = torch.Tensor.index_put if torch.is_grad_enabled() else torch.Tensor.index_put_
    place, written_M = (self.row_M, self.column_M), torch.ones_like(self.row_M, dtype=torch.bool)
    slot.tensors = [write(x, place, new) for x, new in zip(tensors, (k_MKH, v_MKH, written_M))]

  def read(self, slot):
    """Returns the columns of a slot, in batch rows that run."""
    columns = [x[:, :self.num_columns] for x in slot.tensors]
    return columns if self.rows is None else [x[self.rows] for x in columns]

  def spread(self, q_MNH):
    """Returns queries by batch row."""
    return q_MNH.new_zeros(*self.size, *q_MNH.shape[1:]).index_put(self.place, q_MNH)

  def collect(self, out_bCNH):
    """Returns what `spread` laid out, flat."""
    return out_bCNH[self.place]


class MaskedView(_View):
  """Runs every token, and drops what tokens outside `run_BT` give; such a token sees every column."""

  def __init__(self, run_BT, start, valid_BS, rotation_BTH):
    self.run_BT, self.start, (self.batch, self.num_columns) = run_BT, start, valid_BS.shape
    self.rotation_M1H = [self.take(x)[:, None] for x in rotation_BTH]
    column_S = torch.arange(self.num_columns, device=run_BT.device)
    self.mask_bCS = (column_S <= column_S[start:, None]) & valid_BS[:, None]
    self.idle_bC1 = ~run_BT[..., None]

  def take(self, x_BT):
    """Returns all tokens."""
    return x_BT.flatten(0, 1)

  def put(self, x_BT, new_M):
    """Returns `x_BT` with new values of the tokens that run."""
    return torch.where(self.run_BT[..., None], self.spread(new_M), x_BT)

  def write(self, slot, k_MKH, v_MKH):
    """Writes keys and values of all tokens, and marks those that run."""
    fresh = [self.spread(k_MKH), self.spread(v_MKH), self.run_BT]
    if self.start:
      past = slot.grow(k_MKH, v_MKH, self.batch, self.start, 1)
      fresh = [torch.cat([x[:, :self.start], new], 1) for x, new in zip(past, fresh)]
    slot.tensors = fresh

  def read(self, slot):
    """Returns the columns of a slot."""
    return slot.tensors

  def spread(self, x_M):
    """Returns tokens by batch row."""
    return x_M.unflatten(0, self.run_BT.shape)

  def collect(self, out_bCNH):
    """Returns what `spread` laid out, flat."""
    return out_bCNH.flatten(0, 1)


EXECUTIONS = {"gathered": GatheredView, "masked": MaskedView}
