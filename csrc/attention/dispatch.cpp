#include "attention/attention.h"
#include "core/isa.h"

FOLDSCAN_DISPATCH(attention, forward, Forward)
FOLDSCAN_DISPATCH(attention, backward, Backward)
FOLDSCAN_DISPATCH(attention, cache_append, CacheAppend)
FOLDSCAN_DISPATCH(attention, rotary, Rotary)
FOLDSCAN_DISPATCH(attention, merge, Merge)
FOLDSCAN_DISPATCH(attention, merge_backward, MergeBackward)
