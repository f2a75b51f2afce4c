-- A node asks the managers. Whoever asks and hears nothing asks anew: what lies here unread for long is of no use.
redis.call('RPUSH', ASKS, ARGV[3])
redis.call('LTRIM', ASKS, -1000, -1)
redis.call('PEXPIRE', ASKS, 60000)
return 1
