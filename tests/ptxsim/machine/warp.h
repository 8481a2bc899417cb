// warp.h: the interpreter of one warp. Lanes that share a program counter are a group; one group runs at a time, the others
// wait at a barrier, at a collective, or for their turn.
#pragma once

#include "machine.h"

namespace ptxsim {

constexpr u64 NOT_POLLING = 1000;  // steps since a vain question to an mbarrier after which a warp does something else

void start_warp(Warp& w);
bool runnable(const Warp& w);
void run_warp(Warp& w, u64 steps);   // until all groups wait or `steps` instructions are done
std::string waiting(const Warp& w);  // who waits where, for the report of a deadlock

}  // namespace ptxsim
