#include "core/isa.h"
#include "losses/losses.h"

FOLDSCAN_DISPATCH(losses, stats, Stats)
FOLDSCAN_DISPATCH(losses, stats_backward, StatsBackward)
FOLDSCAN_DISPATCH(losses, kl, Kl)
FOLDSCAN_DISPATCH(losses, kl_backward, KlBackward)
