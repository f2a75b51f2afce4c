/* The room for it; it is being built. */
