/* The guest of the conformance suite: greets on the serial port, echoes what is typed, counts, and ends when asked: by
   ctrl-alt-del, by the line "!quit", or at once if the word "quit" is on its command line. "!count" prints how far it
   has counted, "!line" its command line. The word "deaf" makes it ignore ctrl-alt-del. */
#include "guest.h"

static char line[64];
static unsigned length;
static uint64_t count;

static void act(const char *command_line) {
    line[length] = 0;
    length = 0;
    if (starts_with(line, "!quit"))
        power_off();
    if (starts_with(line, "!count"))
        report("count", count);
    if (starts_with(line, "!line")) {
        print(command_line);
        print("\r\n");
    }
}

void guest_main(const char *command_line) {
    int is_deaf = has_word(command_line, "deaf");
    print("microvm-guest: hello\r\n");
    if (has_word(command_line, "quit"))
        power_off();
    for (;;) {
        int byte = typed();
        count++;
        if (byte >= 0) {
            put((char)byte);
            if (byte == '\n' || byte == '\r')
                act(command_line);
            else if (length < sizeof line - 1)
                line[length++] = (char)byte;
        } else if (asked_to_end() && !is_deaf) {
            print("asked to end\r\n");
            power_off();
        }
    }
}
