-- The one instant that decides between the tag and the cancellation: whichever comes first wins.
local held = hold(ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7])
if held == 1 or held == 3 then redis.call('HSET', job_key(ARGV[3]), 'k', '1') end
return held
