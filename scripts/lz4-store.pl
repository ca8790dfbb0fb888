#!/usr/bin/perl
# Writes standard input as an LZ4 stream (legacy frame) that stores its data instead of compressing
# it: one sequence of literals a block. Kbuild calls it in place of lz4 for the bzImage, whose
# decompressor a software KVM interprets instruction by instruction; a stored image is copied eight
# bytes at a time. The formats: lz4_Frame_format.md "Legacy frame", lz4_Block_format.md.
use strict;
use warnings;

use constant {
    LEGACY_MAGIC => 0x184C2102,
    BLOCK_BYTES  => 8 << 20,      # the most that a legacy block holds
    TOKEN        => "\xf0",       # 15 literals or more, no match
};

binmode STDIN;
binmode STDOUT;
print pack('V', LEGACY_MAGIC);
while ((my $length = read(STDIN, my $block, BLOCK_BYTES) // die "lz4-store: $!\n") > 0) {
    die "lz4-store: a block of less than 15 bytes\n" if $length < 15;
    my $rest = $length - 15;
    my $head = TOKEN . "\xff" x ($rest / 255) . chr($rest % 255);
    print pack('V', length($head) + $length), $head, $block;
}
close STDOUT or die "lz4-store: $!\n";
