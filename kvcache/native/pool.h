// The bookkeeping of a bounded pool of pages, and the way from a file into it.
#pragma once

#include "abi.h"

namespace keysift {

void admit(const AdmitCall& call);

// Stops at the first piece that cannot be read in full.
void read_pieces(ReadCall& call);

}  // namespace keysift
