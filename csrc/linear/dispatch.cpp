#include "core/isa.h"
#include "linear/linear.h"

FOLDSCAN_DISPATCH(linear, forward, Forward)
FOLDSCAN_DISPATCH(linear, pack, Pack)
FOLDSCAN_DISPATCH(linear, packed_bytes, PackedBytes)
FOLDSCAN_DISPATCH(linear, backward, Backward)
