/* Keeps a number in the first sector of its disk: greets, echoes what is typed, and after the line "!count" makes the
   number one more and prints it. Ends by ctrl-alt-del. */
#include "blk.h"

static char line[64];
static unsigned length;

static void act(void) {
    line[length] = 0;
    length = 0;
    if (!starts_with(line, "!count"))
        return;
    transfer(READ, 0, SECTOR);
    uint64_t *number = (uint64_t *)data;
    ++*number;
    transfer(WRITE, 0, SECTOR);
    report("count", *number);
}

void guest_main(const char *command_line) {
    begin_disk(command_line);
    print("microvm-guest: hello\r\n");
    for (;;) {
        int byte = typed();
        look_up();
        if (byte < 0)
            continue;
        put((char)byte);
        if (byte == '\n')
            act();
        else if (length < sizeof line - 1)
            line[length++] = (char)byte;
    }
}
