#include "machine.h"
namespace ptxsim {
void race_shared(Warp&, u32, s32, u32, u32, bool, const u8*) {}
void race_global(Warp&, u32, s32, Region&, u64, u32, bool, const u8*, bool) {}
void race_start_block(Block&) {}
void race_copy_issued(Warp&, u32, s32, u32, u32) {}
void race_copy_landed(Warp&, u32, s32, u32, u32) {}
void race_warp_sync(Warp&) {}
void race_arrive(Warp&, Bar&) {}
void race_release(Warp&, Bar&) {}
}
