#include "core/isa.h"
#include "moe/moe.h"

FOLDSCAN_DISPATCH(moe, route, Route)
FOLDSCAN_DISPATCH(moe, route_backward, RouteBackward)
FOLDSCAN_DISPATCH(moe, sort, Sort)
FOLDSCAN_DISPATCH(moe, gather, Gather)
FOLDSCAN_DISPATCH(moe, combine, Combine)
FOLDSCAN_DISPATCH(moe, combine_backward, CombineBackward)
FOLDSCAN_DISPATCH(moe, grouped_mm, GroupedMm)
FOLDSCAN_DISPATCH(moe, grouped_mm_backward, GroupedMmBackward)
FOLDSCAN_DISPATCH(moe, expert_forward, ExpertForward)
FOLDSCAN_DISPATCH(moe, expert_backward, ExpertBackward)
FOLDSCAN_DISPATCH(moe, pack_experts, PackExperts)
