#include "core/isa.h"
#include "core/peak.h"

FOLDSCAN_DISPATCH(probe, peak, Peak)
FOLDSCAN_DISPATCH(probe, gemm, Gemm)
