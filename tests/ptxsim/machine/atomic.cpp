#include "lanes.h"
namespace ptxsim { void add_atomic(Table&) {} }
