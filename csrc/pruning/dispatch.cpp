#include "core/isa.h"
#include "pruning/pruning.h"

FOLDSCAN_DISPATCH(pruning, score_update, ScoreUpdate)
FOLDSCAN_DISPATCH(pruning, group_topk, GroupTopK)
FOLDSCAN_DISPATCH(pruning, mask_2_4, Mask24)
FOLDSCAN_DISPATCH(pruning, compress_2_4, Compress24)
FOLDSCAN_DISPATCH(pruning, linear_2_4, Linear24)
FOLDSCAN_DISPATCH(pruning, linear_2_4_backward, Linear24Backward)
